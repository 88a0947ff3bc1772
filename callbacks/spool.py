"""Hand averages from the process that trained to the one that asked for it (`ddp_spawn`, `ddp_fork`, notebooks)."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch

from soups.stores.averages import KEY


class Spool:
    """A file in the temporary folder whose name both processes know, since it travels with the callback.

    The process that made the callback removes the file, when the callback goes or at its exit.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"soups-averages-{uuid.uuid4().hex}.ckpt"
        weakref.finalize(self, _remove, self.path, os.getpid())

    def exists(self) -> bool:
        """Tell whether another process has left averages."""
        return self.path.exists()

    def write(self, content: dict[str, Any]) -> None:
        """Leave averages for the main process: a checkpoint with `state_dict` and `weight_averages`."""
        temporary = self.path.with_suffix(f".{os.getpid()}")
        torch.save(content, temporary)
        temporary.replace(self.path)

    def read(self) -> dict[str, Any]:
        """Return the `weight_averages` that were left."""
        return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)[KEY]

    def clear(self) -> None:
        """Forget an earlier fit's averages."""
        self.path.unlink(missing_ok=True)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


def in_worker(trainer: Any) -> bool:
    """Tell whether the Trainer's strategy trains in processes that end with the fit."""
    launcher = getattr(trainer.strategy, "launcher", None)
    return any(kind.__name__ in ("_MultiProcessingLauncher", "_XLALauncher") for kind in type(launcher).__mro__)
