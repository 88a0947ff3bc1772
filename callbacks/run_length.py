"""What a Trainer knows of its run before it starts, in the terms of `soups.averaging.units`."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from soups.averaging.units import RunLength


def run_length_of(trainer: pl.Trainer) -> RunLength:
    """Return the lengths of the planned run, counting optimizer steps as the weights see them.

    Under manual optimization the number of steps in an epoch is the number of batches: only the module knows when it steps.
    """
    batches = trainer.num_training_batches
    per_epoch: int | None = None
    lengths: tuple[int, ...] = ()
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    if not math.isinf(batches):
        lengths = _lengths(trainer, int(batches))
        per_epoch = lengths[-1]
        if len(lengths) > 1 and epochs is not None:
            per_epoch = math.ceil(RunLength(per_epoch, lengths=lengths).steps_after(epochs) / epochs)
        lengths = lengths if len(lengths) > 1 else ()
    whole = RunLength(steps_per_epoch=per_epoch, lengths=lengths)
    steps = None if per_epoch is None or epochs is None else int(whole.steps_after(epochs))
    if trainer.max_steps > 0:
        # Lightning counts the steps of every optimizer; the weights see one step a batch.
        limit = math.ceil(trainer.max_steps / max(1, len(trainer.optimizers)))
        steps = limit if steps is None else min(steps, limit)
        if per_epoch is not None:
            reached = 1
            while whole.steps_after(reached) < steps:
                reached += 1
            epochs = reached if epochs is None else min(epochs, reached)
    return RunLength(steps_per_epoch=per_epoch, steps=steps, epochs=epochs, lengths=lengths)


def _lengths(trainer: Any, batches: int) -> tuple[int, ...]:
    """Return the steps of the first epochs, the last of them standing for all that follow."""
    if not trainer.lightning_module.automatic_optimization:
        return (max(1, batches),)
    # Lightning's GradientAccumulationScheduler, of either package.
    schedules = [callback.scheduling for callback in trainer.callbacks if hasattr(callback, "scheduling")]
    if not schedules:
        return (max(1, math.ceil(batches / trainer.accumulate_grad_batches)),)
    factors: dict[int, int] = schedules[-1]
    lengths: list[int] = []
    factor = 1
    for epoch in range(max(factors, default=0) + 1):
        factor = factors.get(epoch, factor)
        lengths.append(max(1, math.ceil(batches / factor)))
    return tuple(lengths)


def steps_before(trainer: pl.Trainer) -> int:
    """Return the steps that the weights have seen before this fit, in an earlier one or in the checkpoint."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def rehearsal(trainer: Any) -> bool:
    """Tell whether this is a `fast_dev_run`, in which nothing is written to disk."""
    return bool(trainer.fast_dev_run)
