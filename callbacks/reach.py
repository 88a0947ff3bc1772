"""Everything that the hooks of a module can reach and change in an evaluation."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import lightning.pytorch as pl

from .sharding import any_sharded
from .state import ObjectState


def state_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    skip: Iterable[int] = (),
    loaders: Iterable[Any] | None = None,
    copied: Collection[int] = (),
) -> ObjectState:
    """Record the module, its data, its optimizers and schedulers, the callbacks and the Trainer's attributes.

    Args:
        trainer: the Trainer.
        module: its module.
        skip: ids of tensors that are exchanged for an average's meanwhile.
        loaders: the loaders that are read; those of training and of the present evaluation when None.
        copied: ids of parameters and optimizers' tensors that are copied whatever their size.
    """
    owner: Any = trainer
    roots: list[Any] = [
        *(_loaders(trainer) if loaders is None else loaders), owner.datamodule, list(trainer.optimizers),
        list(trainer.lr_scheduler_configs), list(owner.callbacks), module,
    ]  # fmt: skip
    tensors = set(skip)
    if any_sharded(dict(module.named_parameters())):
        # Sharded layers exchange their parameters themselves in every forward pass.
        tensors |= {id(layer._parameters) for layer in module.modules()}
    # The module is named last and so walked first; what it shares with others is known by its place there.
    return ObjectState(roots, skip=tensors, shallow=[trainer], copied=copied)


def _loaders(trainer: Any) -> list[Any]:
    if trainer.state.fn == "fit":
        loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop]
    else:
        loops = [trainer.validate_loop, trainer.test_loop]
    return [loader for loop in loops if loop._combined_loader is not None for loader in loop._combined_loader.flattened]
