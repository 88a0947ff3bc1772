"""Which folder the snapshots of a fit go into, so that no run removes another's."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from soups.averaging.snapshots import Snapshots
from soups.errors import ConfigError

from .run_length import rehearsal


class SnapshotFolder:
    """The folder of one callback's snapshots.

    A new run takes a folder of its own, or refuses one that holds snapshots of the same names. Only a run that is resumed
    removes anything: what it wrote itself after the checkpoint.

    Args:
        folder: the folder; `<default_root_dir>/snapshots/<name>`, with a number if that is taken, when None.
        name: the average's name.
        dtype: dtype on disk.
    """

    def __init__(self, folder: str | Path | None, name: str, dtype: str | None) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self._run: dict[str, str] | None = None
        Snapshots("", dtype=dtype)

    def open(self, trainer: pl.Trainer, step: int, profiles: list[str], run: dict[str, Any] | None) -> Snapshots | None:
        """Return the folder of this run, ready to be written; None in a `fast_dev_run`. Every process must call this.

        Raises:
            ConfigError: the folder holds snapshots of another run.
        """
        if rehearsal(trainer):
            return None
        found: tuple[str, str, str] = ("", "", "")
        if trainer.is_global_zero:
            found = self._choose(trainer, step, profiles, run)
        found = trainer.strategy.broadcast(found)
        folder, identity, problem = found
        if problem:
            raise ConfigError(problem)
        self._run = {"id": identity, "folder": Path(folder).name}
        return Snapshots(folder, dtype=self.dtype)

    def _choose(
        self, trainer: pl.Trainer, step: int, profiles: list[str], run: dict[str, Any] | None
    ) -> tuple[str, str, str]:
        parent = Path(trainer.default_root_dir) / "snapshots"
        identity = run["id"] if run is not None else uuid.uuid4().hex
        folder = Path(self.folder) if self.folder is not None else parent / (run["folder"] if run else self.name)
        number = 2
        while self.folder is None and run is None and Snapshots(folder).list():
            folder, number = parent / f"{self.name}-{number}", number + 1
        there = [snapshot for snapshot in Snapshots(folder).list() if snapshot.profile in profiles]
        others = [snapshot for snapshot in there if snapshot.facts.get("run") != identity]
        if others:
            return (
                "",
                "",
                (
                    f"{folder} holds {len(others)} snapshots of {others[0].profile!r} from another run, which this one would mix "
                    f"with its own or overwrite. Give folder= a new folder, move the old one away, or resume that run with "
                    f"trainer.fit(…, ckpt_path=…)."
                ),
            )
        Snapshots(folder).drop_after(step, profiles)
        return str(folder), identity, ""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that every snapshot of this run carries."""
        return {"run": self._run["id"]} if self._run is not None else {}

    def state(self) -> dict[str, Any] | None:
        """Return the run's identity and the name of its folder, for a checkpoint."""
        return dict(self._run) if self._run is not None else None
