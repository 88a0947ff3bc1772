"""Callbacks that the sweep adds to a program's own trainer. They change nothing; the trainer of either package calls them."""

from __future__ import annotations

from typing import Any

from soups.fitting.progress import StepFile
from soups.stores.pool import Pool


class _Observer:
    """A callback that takes no part: every hook that it does not define does nothing.

    No subclass of either package's `Callback`, since one program's trainer takes the one and another's the other.
    """

    state_key = "soups"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: checkpoints of the program stay as they are."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _nothing
        raise AttributeError(name)


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


class ProgramProgress(_Observer):
    """Write the share of a fit that is done, from rank 0; see `soups.fitting.progress.StepFile`."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._file = StepFile(pool, name)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        """Write step and total."""
        if trainer.is_global_zero:
            total = trainer.estimated_stepping_batches
            self._file.write(trainer.global_step, int(total) if total != float("inf") else 0)

    def teardown(self, trainer: Any, *rest: Any, **named: Any) -> None:
        """Remove the file."""
        if trainer.is_global_zero:
            self._file.remove()


class WatchedMetrics(_Observer):
    """Keep the metric that selects at the end of each epoch.

    Args:
        metric: its name.

    Attributes:
        values: one entry an epoch: "epoch" (finished ones), "step", and the metric where it was measured.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.values: list[dict[str, float]] = []
        self._validated = False

    def on_validation_end(self, trainer: Any, *rest: Any) -> None:
        """Note that this epoch has a value; metrics of an earlier one stay visible in the trainer."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, *rest: Any) -> None:
        """Add this epoch's value."""
        entry = {"epoch": float(trainer.current_epoch + 1), "step": float(trainer.global_step)}
        if self._validated and self.metric in trainer.callback_metrics:
            entry[self.metric] = float(trainer.callback_metrics[self.metric])
        self.values.append(entry)
        self._validated = False
