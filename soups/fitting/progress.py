"""How far a fit is, for displays on any machine: it leaves a small file in the pool. And what it measured by epoch."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import lightning.pytorch as lightning

from soups.errors import StorageError
from soups.stores.pool import Pool

# Seconds between two reports: a local file costs nothing, an object in a store does.
LOCAL, REMOTE = 0.5, 10.0


class StepFile:
    """Write the share of a fit that is done into the pool, at most twice a second (into remote pools every ten).

    Args:
        pool: where the fit's result goes.
        name: the fit's fingerprint.
    """

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool, self._name = pool, name
        self._every = LOCAL if pool.local else REMOTE
        self._last = 0.0

    def write(self, step: int, total: int) -> None:
        """Write step and total (0 where it is not known), unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        # A display of progress is no reason to lose a run: a full disk shows where the result is written.
        with contextlib.suppress(StorageError):
            self._pool.report_progress(self._name, {"step": step, "total": total})

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(StorageError):
            self._pool.forget_progress(self._name)


class ReportProgress(lightning.Callback):
    """Write the share of a fit that is done, from rank 0; see `StepFile`."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._file = StepFile(pool, name)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write step and total."""
        if trainer.is_global_zero:
            total = trainer.estimated_stepping_batches
            self._file.write(trainer.global_step, int(total) if total != float("inf") else 0)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remove the file."""
        if trainer.is_global_zero:
            self._file.remove()


class History(lightning.Callback):
    """Keep what a fit measured at the end of each epoch, for the ingredient's record.

    Attributes:
        values: one entry an epoch: "epoch" (finished ones), "step", and those of "train/loss", "heldout/accuracy" and
            "heldout/loss" that were measured in it.
    """

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self._validated = False

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that this epoch has held-out values; metrics of an earlier one stay visible in the trainer."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add this epoch's values."""
        names = ["train/loss"] + (["heldout/accuracy", "heldout/loss"] if self._validated else [])
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        self.values.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **found})
        self._validated = False
