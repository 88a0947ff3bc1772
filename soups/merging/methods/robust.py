"""Element-wise robust means: the median, and the mean without the extremes.

Yin et al., Byzantine-robust distributed learning (arXiv:1803.01498), definitions 1 and 2, on weights.

When it fails: With few models they throw away most of what averaging gains; they are for pools with damaged or hostile models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk
from soups.merging.method import Method, weighted_sum


def sort_across(tensors: list[Tensor]) -> list[Tensor]:
    """Sort several tensors element by element, smallest first; T(T − 1)/2 exchanges and no index.

    >>> [x.tolist() for x in sort_across([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])])]
    [[1.0, 0.0], [3.0, 2.0]]
    """
    rows = list(tensors)
    for step in range(len(rows)):
        for left in range(step % 2, len(rows) - 1, 2):
            low = torch.minimum(rows[left], rows[left + 1])
            rows[left + 1] = torch.maximum(rows[left], rows[left + 1])
            rows[left] = low
    return rows


@dataclass(frozen=True)
class Median(Method):
    """The median of the models, element by element; of an even number, the mean of the middle two."""

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the median."""
        rows = sort_across(chunk.models)
        middle = len(rows) // 2
        return rows[middle] if len(rows) % 2 else rows[middle - 1].add(rows[middle]).mul_(0.5)


@dataclass(frozen=True)
class TrimmedMean(Method):
    """The mean of the models without the extremes, element by element.

    Attributes:
        trim: the share of models to leave out at each end, rounded down; at least one is left over.
    """

    trim: float = 0.2
    least: ClassVar[int] = 1

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the trimmed mean."""
        if not 0 <= self.trim < 0.5:
            raise ConfigError(
                f"trim={self.trim} is not between 0 and 0.5, the share of models to leave out at each end."
            )
        rows = sort_across(chunk.models)
        out = int(self.trim * len(rows))
        kept = rows[out : len(rows) - out]
        return weighted_sum([1.0] * len(kept), [row.clone() for row in kept]).div_(len(kept))
