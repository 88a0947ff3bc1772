"""Snapshots of the raw weights while training: a run becomes ingredients for any recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import lightning.pytorch as pl

from soups.averaging.mean import Mean
from soups.averaging.snapshots import Snapshots
from soups.averaging.units import RunLength, Schedule

from .averaged_fit import AveragedFit
from .base import Averaging
from .folders import SnapshotFolder
from .settings import Common, settings_of
from .sharding import is_sharded


class Trajectory(Averaging):
    """Write full snapshots of the weights at regular points, integer buffers and tied names included.

    Args:
        every: spacing of the snapshots. The last step of the planned run is always one.
        start: where the first one lies.
        folder: where they go; `<default_root_dir>/snapshots/<name>` when None, with a number if that is taken. A folder
            with snapshots of another run is refused; only a resumed run removes any, and only its own.
        snapshot_dtype: dtype on disk; the weights' own when None.
        **options: see `Settings`. `name` is "trajectory" unless given.
    """

    def __init__(
        self,
        every: str = "1ep",
        start: str = "0st",
        *,
        folder: str | Path | None = None,
        snapshot_dtype: str | None = None,
        **options: Unpack[Common],
    ) -> None:
        super().__init__(settings_of(options, name="trajectory", every=every, start=start))
        self._folder = SnapshotFolder(folder, self.settings.name, snapshot_dtype)
        self._schedule: Schedule | None = None
        self._snapshots: Snapshots | None = None

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return no averages; only the schedule is made."""
        self._schedule = Schedule(self.settings.start, self.settings.every, plan, last=True)
        return {}

    def on_begin(self, session: AveragedFit, trainer: pl.Trainer, run: dict[str, Any] | None) -> None:
        """Open the folder, and remove what a run that is resumed wrote after the checkpoint."""
        self._folder.name = self.settings.name
        self._snapshots = self._folder.open(trainer, session.steps, ["raw"], run)

    def run_state(self) -> dict[str, Any] | None:
        """Return which run this is and where its snapshots lie."""
        return self._folder.state()

    def after_step(self, session: AveragedFit, trainer: pl.Trainer, *, epoch_end: bool) -> None:
        """Write the snapshot that is due."""
        schedule, snapshots = self._schedule, self._snapshots
        if schedule is None or snapshots is None or not session.steps:
            return
        if schedule.due(session.steps, session.epochs, epoch_end=epoch_end):
            weights = {
                key: tensor.full_tensor() if is_sharded(tensor) else tensor
                for key, tensor in session.module.state_dict().items()
            }
            if trainer.is_global_zero:
                snapshots.save("raw", session.steps, weights, **self._folder.facts)
