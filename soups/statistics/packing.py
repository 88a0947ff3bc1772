"""Symmetric matrices as their upper triangles: half the bytes in files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soups.stores.store import TensorMeta
from soups.stores.views import StoreView

SYMMETRIC = ("gram", "kfac_out")
"""Kinds of statistics whose last two axes are a symmetric matrix."""


def is_symmetric(name: str) -> bool:
    """Tell whether a statistic, `kind/weight`, is symmetric in its last two axes."""
    return name.partition("/")[0] in SYMMETRIC


def pack(matrix: Tensor) -> Tensor:
    """Return the upper triangle of symmetric matrices (…, n, n), row by row: (…, n(n+1)/2).

    >>> pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([1., 2., 3.])
    """
    return torch.cat([matrix[..., row, row:] for row in range(matrix.shape[-1])], dim=-1)


def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrices (…, n, n) that were packed."""
    size = _side(packed.shape[-1])
    matrix = packed.new_empty(*packed.shape[:-1], size, size)
    start = 0
    for row in range(size):
        values = packed[..., start : start + size - row]
        matrix[..., row, row:] = values
        matrix[..., row:, row] = values
        start += size - row
    return matrix


def _side(count: int) -> int:
    return (math.isqrt(8 * count + 1) - 1) // 2


class UnpackedStore(StoreView):
    """A file of statistics whose symmetric matrices are packed, with the matrices in full."""

    def changes(self, name: str) -> bool:
        """Tell whether a tensor is packed."""
        return is_symmetric(name)

    def change(self, name: str) -> str:
        """Return what was done to a tensor."""
        return "unpacked"

    def changed_meta(self, name: str) -> TensorMeta:
        """Return the shape (…, n, n) of a matrix in full."""
        shape, dtype = self.store.meta(name)
        side = _side(shape[-1])
        return TensorMeta((*shape[:-1], side, side), dtype)

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements of a matrix in full."""
        return unpack(self.store.read(name)).reshape(-1)[start:stop]
