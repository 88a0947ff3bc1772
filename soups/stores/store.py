"""The one way to read a checkpoint: names first, then tensors, then slices of them, each only when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from soups.weights import Weights


class TensorMeta(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes of the tensor's elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Store(ABC):
    """A checkpoint as lazily read tensors. Open it in a `with` block, or call `close`.

    `location` says where it is, for messages. Reading needs memory for the slice that was asked for and no more.
    """

    location: str

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the names of all tensors, in the file's order."""

    @abstractmethod
    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor, from the header alone."""

    @abstractmethod
    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or `tensor[rows]` along its first axis, on the CPU."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def load(self) -> dict[str, Tensor]:
        """Read every tensor into memory."""
        return {key: self.read(key) for key in self.keys()}


class DictStore(Store):
    """Weights that are in memory already."""

    def __init__(self, weights: Weights, location: str = "weights in memory") -> None:
        self.location = location
        self._weights: Mapping[str, Tensor] = weights

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._weights)

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor."""
        tensor = self._weights[key]
        return TensorMeta(tuple(tensor.shape), tensor.dtype)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return the tensor itself, or a view of some rows."""
        tensor = self._weights[key].detach()
        return tensor if rows is None else tensor[rows]
