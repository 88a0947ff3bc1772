"""CABS: n:m pruning of each task vector, on elements that no earlier one has taken.

CABS (arXiv:2503.01874): task vectors are pruned one after another; of every m neighbours each keeps its n largest magnitudes
among those still free, so that no two overlap (conflict-aware) and every neighbourhood is used alike (balanced). This is the
n:m pruning of the authors' code for RoBERTa, and of theirs for 7B models where 2n ≤ m, for any number of models. That code
drops an incomplete last group; here it is pruned like the others.

When it fails: The first models choose first, so the order of the models decides; and n:m groups suit matrices, not short vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk
from soups.merging.method import Method, PerModel, per_model
from soups.merging.sums import BLOCK


@dataclass(frozen=True)
class CABS(Method):
    """θ_0 + λ Σ w_t (mask_t ⊙ τ_t), masks disjoint, n of every m elements in each; the first models choose first.

    Attributes:
        keep: n; 64 of 256 are the defaults of the authors' code for 7B models.
        group: m, neighbours in row-major order; a power of two.
        weight: one for all models or one for each.
        scale: λ, the factor of the merged task vector.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    keep: int = 64
    group: int = 256
    weight: PerModel = 1.0
    scale: float = 1.0

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        group = self.group
        if group < 1 or BLOCK % group or not 0 < self.keep <= group:
            raise ConfigError(
                f"group={group} must be a power of two up to {BLOCK}, and keep={self.keep} between 1 and it."
            )
        deltas = chunk.deltas()
        size = -(-chunk.base.numel() // group) * group
        free = torch.ones(size // group, group, dtype=chunk.base.dtype, device=chunk.base.device)
        total = torch.zeros_like(chunk.base)
        for delta, weight in zip(deltas, per_model(self.weight, len(deltas)), strict=True):
            padded = torch.zeros(size, dtype=delta.dtype, device=delta.device)
            padded[: delta.numel()] = delta.abs()
            # −1 for what is taken; zeros are never worth a place.
            magnitude = (padded.view(-1, group) + 1).mul_(free).sub_(1)
            mask = largest(magnitude, self.keep).mul_((magnitude > 0).to(free.dtype))
            free.sub_(mask)
            total += delta.mul_(mask.view(-1)[: delta.numel()]).mul_(weight)
        return total.mul_(self.scale).add_(chunk.base)


def largest(rows: Tensor, count: int) -> Tensor:
    """Return ones where a row's `count` largest elements are, the earlier of equal ones, and zeros elsewhere.

    Which of equal elements `topk` takes depends on the device.

    >>> largest(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist()
    [[0.0, 1.0, 1.0, 0.0]]
    """
    least = rows.topk(count, dim=1).values[:, -1:]
    mask = rows > least
    equal = rows == least
    room = count - mask.sum(1, dtype=torch.int32, keepdim=True)
    return (mask | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))).to(rows.dtype)
