"""Latest weight averaging: the equal mean of the last k points.

Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging (arXiv:2209.14981), with one
point an epoch; Early Weight Averaging meets High Learning Rates for LLM Pre-training (arXiv:2306.03241) takes k points
some hundred steps apart from the beginning of training. Both are settings of the same window.
"""

# torch's foreach functions carry an underscore but are what torch.optim itself is made of.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack
from zlib import crc32

import torch
from torch import Tensor

from soups.averaging.mean import DTYPES, SMALL, Mean, MeanOptions, storage_dtype
from soups.errors import ConfigError
from soups.weights import Weights, mean

# Windows after which every part of the running mean has been computed anew, which bounds its rounding error.
REFRESH = 8


class LAWA(Mean):
    """Equal mean of the last k points: a ring of snapshots and their running mean.

    An update reads the new point and the oldest snapshot, whatever k is. Rounding cannot pile up in the running mean:
    every update also recomputes a part of it from the ring, so that all of it is fresh after 8 k updates.

    Args:
        k: points in the window.
        snapshots: where the ring lives: "device" (that of the mean), "cpu" or "disk" (memory-mapped files).
        snapshot_dtype: dtype of the ring; float32 when None. "bfloat16" halves it and rounds every point once.
        folder: where the files of "disk" go, in a temporary folder of this average; the system's when None.
        **keep: dtype and device of the mean, and more; see `MeanOptions`.

    >>> lawa = LAWA(k=2)
    >>> for value in (1.0, 2.0, 6.0):
    ...     lawa.update({"w": torch.tensor([value])})
    >>> lawa.value()["w"]
    tensor([4.])

    Raises:
        ConfigError: k below 1, an unknown place or dtype, or `fused`.
    """

    kind = "LAWA"

    def __init__(
        self,
        k: int = 10,
        *,
        snapshots: str = "device",
        snapshot_dtype: torch.dtype | str | None = None,
        folder: str | Path | None = None,
        **keep: Unpack[MeanOptions],
    ) -> None:
        super().__init__(**keep)
        if self.fused:
            raise ConfigError("A LAWA window has nothing to fuse; fused=True is for EMA and power-function averages.")
        if k < 1:
            raise ConfigError(f"LAWA averages the last k points, and k={k} leaves none. Give k of 1 or more.")
        if snapshots not in ("device", "cpu", "disk"):
            raise ConfigError(f"snapshots={snapshots!r} is none of 'device', 'cpu', 'disk'.")
        if self.dtype == torch.bfloat16:
            raise ConfigError(
                "The mean of a LAWA window is kept in float32; use snapshot_dtype='bfloat16' for its ring."
            )
        if isinstance(snapshot_dtype, str):
            if snapshot_dtype not in DTYPES:
                raise ConfigError(f"snapshot_dtype={snapshot_dtype!r} is none of {', '.join(DTYPES)}.")
            snapshot_dtype = DTYPES[snapshot_dtype]
        self.k = k
        self.snapshots = snapshots
        self.snapshot_dtype = snapshot_dtype
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._slot = 0

    def _planes_needed(self) -> Sequence[str]:
        return ("mean", *(f"ring{slot}" for slot in range(min(self.count + 1, self.k))))

    def _overwritten(self) -> Sequence[str]:
        slot = f"ring{self.count % self.k}"
        return ("mean", slot) if slot in self._planes else ("mean",)

    def _plane_dtype(self, plane: str) -> torch.dtype | None:
        return self.dtype if plane == "mean" else (self.snapshot_dtype or self.dtype)

    def _plane_device(self, plane: str) -> torch.device | None:
        return self.device if plane == "mean" or self.snapshots == "device" else torch.device("cpu")

    def _like(self, tensor: Tensor, plane: str) -> Tensor:
        if not self._on_disk(plane, tensor):
            return super()._like(tensor, plane)
        if self._temporary is None:
            if self.folder is not None:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix="lawa-", dir=self.folder)
        folder = Path(self._temporary.name)
        self._files += 1
        dtype = storage_dtype(tensor.dtype, self._plane_dtype(plane))
        file = folder / f"{plane}-{self._files}.bin"
        flat = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=dtype)
        return flat.as_strided(tensor.size(), torch.empty_like(tensor, device="meta").stride())

    def _begin(self) -> None:
        self._slot = self.count % self.k

    def _stale(self) -> bool:
        return self.count < self.k

    def _misplaced(self, old: Tensor, tensor: Tensor, plane: str) -> bool:
        # A restored ring is in memory; nothing but a file of its own has this name.
        return super()._misplaced(old, tensor, plane) or (
            self._on_disk(plane, old) and old.untyped_storage().filename is None
        )

    def _on_disk(self, plane: str, tensor: Tensor) -> bool:
        return plane != "mean" and self.snapshots == "disk" and tensor.numel() > SMALL

    def _apply(self, index: int, views: dict[str, list[Tensor]], theta: list[Tensor]) -> None:
        ring, average = views[f"ring{self._slot}"], views["mean"]
        if self._before < self.k:
            torch._foreach_copy_(ring, theta)
            if self._before:
                torch._foreach_lerp_(average, _as(ring, average), 1 / (self._before + 1))
            else:
                torch._foreach_copy_(average, ring)
            return
        fresh = self._fresh(index)
        kept = [number for number, is_fresh in enumerate(fresh) if not is_fresh]
        if kept:
            part, old = [average[n] for n in kept], [ring[n] for n in kept]
            torch._foreach_add_(part, _as(old, average), alpha=-1 / self.k)
            torch._foreach_copy_(old, [theta[n] for n in kept])
            torch._foreach_add_(part, _as(old, average), alpha=1 / self.k)
        if len(kept) < len(average):
            again = [number for number, is_fresh in enumerate(fresh) if is_fresh]
            part = [average[n] for n in again]
            torch._foreach_copy_([ring[n] for n in again], [theta[n] for n in again])
            torch._foreach_copy_(part, [views["ring0"][n] for n in again])
            for other in range(1, self.k):
                torch._foreach_add_(part, _as([views[f"ring{other}"][n] for n in again], average))
            torch._foreach_mul_(part, 1 / self.k)

    def _fresh(self, index: int) -> list[bool]:
        """Say which of a group's tensors are recomputed from the ring at this update: each once in 8 k updates.

        The turn depends on the tensor alone, so that the same bits come out however tensors are grouped.
        """
        assert self._pass is not None
        now = self._before % (REFRESH * self.k)
        if self._pass.stages[index] is not None:
            return [now == 0]
        return [
            (0 if numel <= SMALL else crc32(f"{name}:{part and part.start}".encode()) % (REFRESH * self.k)) == now
            for (name, part), numel in zip(self._pass.entries[index], self._pass.sizes[index], strict=True)
        ]

    def _scalars(self) -> dict[str, Any]:
        return {"k": self.k}

    def _load_scalars(self, scalars: Mapping[str, Any]) -> None:
        if scalars["k"] != self.k:
            raise ConfigError(
                f"The saved window has k={scalars['k']} and this LAWA has k={self.k}. Resume with the same k, or start "
                f"a new average under another name."
            )


def _as(source: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Return `source` in the dtype and device of `like`; the same list where they are already."""
    if source[0].dtype == like[0].dtype and source[0].device == like[0].device:
        return source
    return [tensor.to(device=like[0].device, dtype=like[0].dtype) for tensor in source]


def latest_mean(points: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the equal mean of saved points: the plain function behind `LAWA`.

    >>> latest_mean([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])["w"]
    tensor([2.])
    """
    return mean(points)
