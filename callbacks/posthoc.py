"""Post-hoc EMA while training: two power-function averages, snapshotted now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import lightning.pytorch as pl

from soups.averaging import units
from soups.averaging.mean import Mean
from soups.averaging.power import PowerEMA
from soups.averaging.snapshots import Snapshots
from soups.averaging.units import RunLength, Schedule

from .averaged_fit import AveragedFit
from .base import Averaging
from .folders import SnapshotFolder
from .settings import Options, settings_of
from .sharding import gather


class PostHocEMA(Averaging):
    """Track power-function averages and write snapshots of them, to choose the EMA length afterwards (arXiv:2312.02696).

    After training `soups.averaging.PostHoc(folder)` gives the weights of any profile, with the residual of the fit.

    Args:
        sigmas: relative widths of the tracked profiles; the paper tracks two.
        snapshot_every: spacing of the snapshots. The last step of the planned run is always one.
        folder: where they go; `<default_root_dir>/snapshots/<name>` when None, with a number if that is taken. A folder
            with snapshots of another run is refused; only a resumed run removes any, and only its own.
        snapshot_dtype: dtype on disk; float32 when None, "bfloat16" to halve it.
        **options: see `Settings`. `name` is "posthoc" unless given.
    """

    def __init__(
        self,
        sigmas: Sequence[float] = (0.05, 0.10),
        snapshot_every: str = "2%",
        *,
        folder: str | Path | None = None,
        snapshot_dtype: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(settings_of(options, name="posthoc"))
        self.sigmas = tuple(sigmas)
        self.snapshot_every = units.parse(snapshot_every)
        self._folder = SnapshotFolder(folder, self.settings.name, snapshot_dtype)
        for sigma in self.sigmas:
            PowerEMA(sigma)
        self._schedule: Schedule | None = None
        self._snapshots: Snapshots | None = None

    def _names(self) -> dict[str, float]:
        return {f"{self.settings.name}@{sigma:g}": sigma for sigma in self.sigmas}

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return one average a profile."""
        settings = self.settings
        interval = max(1, round(units.steps(settings.every, plan)))
        self._schedule = Schedule("0st", self.snapshot_every, plan, last=True)
        return {
            name: PowerEMA(
                sigma,
                interval=interval,
                **settings.keep(covers),
            )
            for name, sigma in self._names().items()
        }

    def on_begin(self, session: AveragedFit, trainer: pl.Trainer, run: dict[str, Any] | None) -> None:
        """Open the folder, and remove what a run that is resumed wrote after the checkpoint."""
        self._folder.name = self.settings.name
        self._snapshots = self._folder.open(trainer, session.steps, list(self._names()), run)

    def run_state(self) -> dict[str, Any] | None:
        """Return which run this is and where its snapshots lie."""
        return self._folder.state()

    def after_step(self, session: AveragedFit, trainer: pl.Trainer, *, epoch_end: bool) -> None:
        """Write the snapshots that are due."""
        schedule, snapshots = self._schedule, self._snapshots
        if schedule is None or snapshots is None or not session.steps:
            return
        if not schedule.due(session.steps, session.epochs, epoch_end=epoch_end):
            return
        for name in self._names():
            mean = session.tracked[name].mean
            if not mean.count:
                continue
            assert isinstance(mean, PowerEMA)
            originals = session.originals()
            weights = {key: gather(tensor, originals[key]) for key, tensor in mean.value().items()}
            if trainer.is_global_zero:
                facts = {"gamma": mean.gamma, "count": mean.count, "interval": mean.interval, **self._folder.facts}
                snapshots.save(name, session.steps, weights, **facts)
