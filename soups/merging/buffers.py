"""Memory that a thread uses again and again: fresh memory would cost a page fault for each 4 KiB of it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def buffer(slot: str | int, dtype: torch.dtype, count: int) -> Tensor:
    """Return this thread's flat CPU tensor of a name; its contents hold until the name is asked for again."""
    kept: dict[tuple[str | int, torch.dtype], Tensor] = _kept.__dict__.setdefault("buffers", {})
    found = kept.get((slot, dtype))
    if found is None or found.numel() < count:
        kept.pop((slot, dtype), None)  # first, so that the two are never there together
        found = kept[slot, dtype] = torch.empty(count, dtype=dtype)
    return found[:count]
