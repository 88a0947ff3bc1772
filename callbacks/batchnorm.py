"""Measure BatchNorm statistics for an average through the module's own training forward, from inside a run."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from soups.averaging.batchnorm import batch_norms, measuring, restore, statistics
from soups.errors import ConfigError, DataError

from .branches import warn_of_written
from .loaders import twin
from .loggers import loggers_replaced
from .quiet import replaced
from .reach import state_of

Forward = Callable[[pl.LightningModule, Any], Any]
_EXAMPLE = "EMA(buffers='reestimate', forward=lambda module, batch: module(batch[0]))"
_FORWARD = f"Give a forward pass that writes into nothing: {_EXAMPLE}."


def remeasure(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: int,
    forward: Forward | None = None,
    *,
    skip: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Return BatchNorm statistics for the weights that `module` holds now; its own are put back.

    Everything that `training_step` and the loaders change is put back: attributes, metrics, random generators, samplers.

    Args:
        trainer: in a fit, with a training loader.
        module: its `training_step` is called without gradients, unless `forward` is given.
        batches: how many training batches to use, a process.
        forward: what to do with the module and a batch instead.
        skip: ids of tensors that are exchanged for an average's.

    Returns:
        State-dict name to tensor: running means, running variances, numbers of batches.

    Raises:
        ConfigError: a module with manual optimization and no `forward`, whose training step would train; a `training_step`
            that fails in evaluation mode; training data that can be read only once.
        DataError: there were no training batches.
    """
    if not batch_norms(module):
        return {}
    if forward is None and not module.automatic_optimization:
        raise ConfigError(
            "BatchNorm statistics are measured through training_step, and with manual optimization that would train. "
            f"Say what the forward pass is: {_EXAMPLE}."
        )
    loaders = trainer.train_dataloader
    before = state_of(trainer, module, skip=skip)
    _refuse_streams(loaders)
    own = statistics(module)
    seen = 0
    try:
        before.lend_iterators()
        with isolate_rng(), torch.no_grad(), _unlogged(trainer, module), measuring(module):
            for number, batch in enumerate(islice(_batches(trainer), batches)):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                with trainer.precision_plugin.train_step_context():
                    _forward(module, batch, number, forward)
                seen += 1
        measured = statistics(module)
    finally:
        restore(module, own)
        now = state_of(trainer, module, skip=skip)
        before.put_back(now)
        if lost := before.uncopied(now):
            warn_of_written("BatchNorm statistics were measured", [place for _, place in lost.values()], _FORWARD)
    if not seen:
        raise DataError(
            "There were no training batches to measure BatchNorm statistics with: the training data can be read only once. "
            "Use buffers='average' or 'live', or a loader that can be read again."
        )
    return _mean_over_processes(measured)


def _forward(module: pl.LightningModule, batch: Any, number: int, forward: Forward | None) -> None:
    try:
        if forward is not None:
            forward(module, batch)
        else:
            module.training_step(*_arguments(module, batch, number))
    except Exception as error:
        called = "the forward pass that was given" if forward is not None else "training_step"
        raise ConfigError(
            f"BatchNorm statistics are measured with the module in evaluation mode, only its BatchNorm layers in training "
            f"mode, and {called} fails there: {type(error).__name__}: {error}. Networks with auxiliary heads, and detectors, "
            f"return something else in evaluation. Give a forward pass that suits: {_EXAMPLE}."
        ) from error


def _unlogged(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    from contextlib import ExitStack

    def ignore(*_: Any, **__: Any) -> None:
        return None

    stack = ExitStack()
    stack.enter_context(replaced(module, log=ignore, log_dict=ignore))
    stack.enter_context(loggers_replaced(trainer, None))
    return stack


def _refuse_streams(loaders: Any) -> None:
    """Refuse training data that a second reading would use up.

    Raises:
        ConfigError: a generator, or a data set that holds one, and no workers with copies of it.
    """
    from .state import ObjectState

    for loader in _flat(loaders):
        if getattr(loader, "num_workers", 0):
            continue  # workers read copies
        streams = ObjectState([loader]).streams
        if hasattr(type(loader), "__next__"):
            streams = [type(loader).__name__, *streams]
        if streams:
            raise ConfigError(
                f"Measuring BatchNorm statistics would use up training data: {streams[0]} is an iterator that cannot be read "
                f"again. Use buffers='average' or 'live', or a data set whose __iter__ begins anew."
            )


def _flat(loaders: Any) -> list[Any]:
    if isinstance(loaders, dict):
        return [part for loader in loaders.values() for part in _flat(loader)]
    if isinstance(loaders, list | tuple):
        return [part for loader in loaders for part in _flat(loader)]
    return [] if loaders is None else [loaders]


def _arguments(module: pl.LightningModule, batch: Any, number: int) -> list[Any]:
    names = list(inspect.signature(module.training_step).parameters)
    return [batch, number] if "batch_idx" in names or len(names) > 1 else [batch]


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    combined = trainer.fit_loop._combined_loader
    mode: Any = "max_size_cycle" if combined is None else combined._mode
    for batch, _, _ in CombinedLoader(twin(trainer.train_dataloader), mode):
        yield batch


def _mean_over_processes(measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average over processes: with cumulative momentum this equals one process that saw all of their batches."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        for tensor in measured.values():
            if tensor.is_floating_point():
                torch.distributed.all_reduce(tensor)
                tensor /= world
    return measured
