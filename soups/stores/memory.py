"""Stores without a file: weights in memory, and checkpoints that are only planned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from soups.errors import WeightsError
from soups.stores.store import Store, TensorMeta
from soups.weights import Weights, tied_names


class DictStore(Store):
    """Weights that are in memory already."""

    def __init__(self, weights: Weights, location: str = "weights in memory") -> None:
        self.location = location
        self._weights: Mapping[str, Tensor] = weights

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._weights)

    def _tensor(self, key: str) -> Tensor:
        if key not in self._weights:
            raise self.absent(key)
        return self._weights[key].detach()

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor."""
        tensor = self._tensor(key)
        return TensorMeta(tuple(tensor.shape), tensor.dtype)

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return a view of elements `start:stop`; a copy where the tensor is not contiguous or not on the CPU."""
        return self._tensor(key).cpu().reshape(-1)[start:stop]

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return the tensor itself, or a view of some rows."""
        tensor = self._tensor(key)
        return tensor if rows is None else tensor[rows]

    def tied(self) -> dict[str, str]:
        """Map each tied name to the name it repeats."""
        return tied_names(self._weights)


class HeaderStore(Store):
    """A checkpoint that is not there yet: names, shapes and dtypes, for plans.

    Args:
        location: what to call it in messages.
        plan: every tensor.
        tied: names that repeat another one.
    """

    def __init__(self, location: str, plan: Mapping[str, TensorMeta], tied: Mapping[str, str] | None = None) -> None:
        self.location = location
        self._plan, self._tied = dict(plan), dict(tied or {})

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return [*self._plan, *self._tied]

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor."""
        return self._plan[self._tied.get(key, key)]

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Refuse: there is nothing to read."""
        raise WeightsError(f"{self.location} is only planned; its tensor {key!r} cannot be read.")

    def tied(self) -> dict[str, str]:
        """Map each tied name to the name it repeats."""
        return dict(self._tied)
