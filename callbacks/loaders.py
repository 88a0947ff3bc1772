"""Read a data loader a second time without using up its random numbers or its workers' state."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader


def twin(loaders: Any) -> Any:
    """Return loaders that share data sets and samplers with `loaders`, but no iterator: workers may be in use."""
    if isinstance(loaders, DataLoader):
        other = copy.copy(loaders)
        other.__dict__["_iterator"] = None
        return other
    if isinstance(loaders, dict):
        return {key: twin(loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(twin(loader) for loader in loaders)
    return loaders


def without_workers_state(combined: Any) -> Any:
    """Return a combined loader in which persistent workers, whose random state cannot be put back, are replaced by new ones.

    The same object where there are none.
    """
    if not any(getattr(loader, "persistent_workers", False) for loader in combined.flattened):
        return combined
    other = copy.copy(combined)
    other.flattened = [twin(loader) for loader in combined.flattened]
    return other
