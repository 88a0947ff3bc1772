"""Measure BatchNorm statistics for an average through the module's own training forward, from inside a run."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from soups.averaging.batchnorm import batch_norms, measuring, restore, statistics
from soups.errors import ConfigError

from .quiet import silent

Forward = Callable[[pl.LightningModule, Any], Any]


def remeasure(
    trainer: pl.Trainer, module: pl.LightningModule, batches: int, forward: Forward | None = None
) -> dict[str, Tensor]:
    """Return BatchNorm statistics for the weights that `module` holds now; its own are put back.

    The optimizer, the logged metrics, the random state and the training loader's position are as before.

    Args:
        trainer: in a fit, with a training loader.
        module: its `training_step` is called without gradients, unless `forward` is given.
        batches: how many training batches to use, a process.
        forward: what to do with the module and a batch instead.

    Returns:
        State-dict name to tensor: running means, running variances, numbers of batches.

    Raises:
        ConfigError: a module with manual optimization and no `forward`: its training step would train.
    """
    if not batch_norms(module):
        return {}
    if forward is None and not module.automatic_optimization:
        raise ConfigError(
            "BatchNorm statistics are measured through training_step, and with manual optimization that would train. "
            "Say what the forward pass is: EMA(buffers='reestimate', forward=lambda module, batch: module(batch[0]))."
        )
    own = statistics(module)
    try:
        with torch.no_grad(), silent(module), measuring(module), _untouched_generators(trainer.train_dataloader):
            for number, batch in enumerate(islice(_batches(trainer), batches)):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                with trainer.precision_plugin.train_step_context():
                    if forward is not None:
                        forward(module, batch)
                    else:
                        module.training_step(*_arguments(module, batch, number))
        measured = statistics(module)
    finally:
        restore(module, own)
    return _mean_over_processes(measured)


def _arguments(module: pl.LightningModule, batch: Any, number: int) -> list[Any]:
    import inspect

    names = list(inspect.signature(module.training_step).parameters)
    return [batch, number] if "batch_idx" in names or len(names) > 1 else [batch]


def _copies(loaders: Any) -> Any:
    """Return loaders that share data sets and samplers with `loaders`, but no iterator (workers may be in use)."""
    if isinstance(loaders, DataLoader):
        twin = copy.copy(loaders)
        twin.__dict__["_iterator"] = None
        return twin
    if isinstance(loaders, dict):
        return {key: _copies(loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(_copies(loader) for loader in loaders)
    return loaders


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    combined = trainer.fit_loop._combined_loader
    mode: Any = "max_size_cycle" if combined is None else combined._mode
    for batch, _, _ in CombinedLoader(_copies(trainer.train_dataloader), mode):
        yield batch


@contextmanager
def _untouched_generators(loaders: Any) -> Generator[None]:
    """Put the states of the loaders' random generators back, so that the order of training data stays the same."""
    found: list[torch.Generator] = []

    def collect(item: Any) -> None:
        if isinstance(item, dict):
            for part in item.values():
                collect(part)
        elif isinstance(item, list | tuple):
            for part in item:
                collect(part)
        else:
            for owner in (item, getattr(item, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    found.append(generator)

    collect(loaders)
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _mean_over_processes(measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average over processes: with cumulative momentum this equals one process that saw all of their batches."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        for tensor in measured.values():
            if tensor.is_floating_point():
                torch.distributed.all_reduce(tensor)
                tensor /= world
    return measured
