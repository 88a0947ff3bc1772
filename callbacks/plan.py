"""What a Trainer knows of its run before it starts, in the terms of `soups.averaging.units`."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from soups.averaging.units import Plan


def plan_of(trainer: pl.Trainer) -> Plan:
    """Return the lengths of the planned run, counting optimizer steps as the weights see them.

    Under manual optimization the number of steps in an epoch is the number of batches: only the module knows when it steps.
    """
    batches = trainer.num_training_batches
    per_epoch: int | None = None
    if not math.isinf(batches):
        accumulate = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        per_epoch = max(1, math.ceil(batches / accumulate))
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    steps = None if per_epoch is None or epochs is None else per_epoch * epochs
    if trainer.max_steps > 0:
        # Lightning counts the steps of every optimizer; the weights see one step a batch.
        limit = math.ceil(trainer.max_steps / max(1, len(trainer.optimizers)))
        steps = limit if steps is None else min(steps, limit)
        if per_epoch is not None:
            reached = math.ceil(steps / per_epoch)
            epochs = reached if epochs is None else min(epochs, reached)
    return Plan(steps_per_epoch=per_epoch, steps=steps, epochs=epochs)


def rehearsal(trainer: Any) -> bool:
    """Tell whether this is a `fast_dev_run`, in which nothing is written to disk."""
    return bool(trainer.fast_dev_run)
