"""Sums over a tensor that do not depend on how the tensor is cut into chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soups.merging import kernels
from soups.merging.kernels import absolute

BLOCK = 16_384
"""Elements between two possible chunk borders, and in one partial sum."""


class BlockSum:
    """A sum over a tensor that comes out the same bits however the tensor is cut at multiples of `BLOCK`.

    Each block is summed by itself, in float64; the partial sums are added without rounding error (`math.fsum`).

    Args:
        block: elements in a partial sum: `Operands.block`.

    >>> total = BlockSum(); total.add(torch.ones(BLOCK)); total.add(torch.ones(3)); total.value()
    16387.0
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._parts: list[float] = []

    def add_magnitudes(self, values: Tensor) -> None:
        """Add the absolute values of a chunk; within a block in the chunk's own dtype, which is enough for a ratio."""
        self.extend(kernels.block_sums(absolute(values), self._block))

    def extend(self, sums: Tensor) -> None:
        """Add the sums of a chunk's blocks."""
        self._parts.extend(sums.tolist())

    def add(self, values: Tensor) -> None:
        """Add a chunk's values; all chunks but the last have a multiple of `block` elements."""
        whole = values.numel() // self._block * self._block
        if whole:
            self.extend(values[:whole].view(-1, self._block).sum(1, dtype=torch.float64))
        if whole < values.numel():
            self._parts.append(float(values[whole:].sum(dtype=torch.float64)))

    def value(self) -> float:
        """Return the sum of everything that was added."""
        return math.fsum(self._parts)
