"""A folder of snapshots: points of a trajectory, or states of averages, one safetensors file each.

The folder is its own index: a file `<profile>-<step>.safetensors` with its facts in the header. Files are whole or
absent, so a killed run leaves a folder that can be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soups.averaging.mean import DTYPES
from soups.errors import ConfigError, DataError
from soups.stores.safetensors import SafetensorsStore
from soups.stores.writer import write_safetensors
from soups.weights import Weights, is_averaged

_FACTS = "soups.snapshot"


@dataclass(frozen=True)
class Snapshot:
    """One file of the folder.

    Attributes:
        profile: what was saved: "raw" for the weights themselves, else the name of an average.
        step: optimizer steps taken.
        path: the file.
        facts: whatever was noted with it (JSON), such as the number of updates of an average.
    """

    profile: str
    step: int
    path: Path
    facts: Mapping[str, Any]

    def open(self) -> SafetensorsStore:
        """Open the file as a lazily read store; close it, or use it in a `with` block."""
        return SafetensorsStore(self.path)

    def load(self) -> dict[str, torch.Tensor]:
        """Read all tensors."""
        with self.open() as store:
            return store.load()


class Snapshots:
    """A folder of snapshots.

    Args:
        folder: the folder; made when the first snapshot is saved.
        dtype: dtype in which floating tensors are written; their own when None.
    """

    def __init__(self, folder: str | Path, *, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
        self.folder = Path(folder)
        self.dtype = None if dtype is None else DTYPES[dtype]

    def save(self, profile: str, step: int, weights: Weights, **facts: Any) -> Path:
        """Write one snapshot; a file of the same profile and step is replaced.

        Raises:
            StorageError: the folder cannot be written; what was there is kept.
        """
        if self.dtype is not None:
            weights = {
                name: tensor.to(self.dtype) if is_averaged(tensor) and not tensor.is_complex() else tensor
                for name, tensor in weights.items()
            }
        path = self.folder / f"{profile}-{step:09d}.safetensors"
        note = json.dumps({"profile": profile, "step": step, **facts}, sort_keys=True)
        write_safetensors(path, weights, {_FACTS: note})
        return path

    def list(self, profile: str | None = None) -> list[Snapshot]:
        """Return the snapshots in the order of their steps, of one profile or of all."""
        found: list[Snapshot] = []
        for path in sorted(self.folder.glob("*-*.safetensors")) if self.folder.is_dir() else []:
            with SafetensorsStore(path) as store:
                facts = json.loads(store.metadata.get(_FACTS, "null"))
            if facts is not None and profile in (None, facts["profile"]):
                found.append(Snapshot(facts["profile"], facts["step"], path, facts))
        return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.profile))

    def load(self, profile: str, step: int) -> dict[str, torch.Tensor]:
        """Read one snapshot.

        Raises:
            DataError: there is none of this profile and step; the message lists those there are.
        """
        for snapshot in self.list(profile):
            if snapshot.step == step:
                return snapshot.load()
        there = ", ".join(f"{snapshot.profile} at {snapshot.step}" for snapshot in self.list()) or "nothing"
        raise DataError(f"{self.folder} holds no snapshot of {profile!r} at step {step}. It holds: {there}.")

    def drop_after(self, step: int, profiles: list[str] | None = None) -> int:
        """Remove snapshots later than `step`, which a run resumed there will write again. Return how many."""
        late = [s for s in self.list() if s.step > step and (profiles is None or s.profile in profiles)]
        for snapshot in late:
            snapshot.path.unlink(missing_ok=True)
        return len(late)
