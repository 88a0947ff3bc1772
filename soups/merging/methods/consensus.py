"""Consensus task arithmetic: keep only the elements that at least k tasks find important.

Localizing task information for improved model merging and compression (arXiv:2405.07813), equations 4 and 6:
m_t = 1[|τ_t| > λ_t |τ_MTL − τ_t|], τ_MTL = Σ τ_t;  θ = θ_0 + α · 1[Σ m_t ≥ k] ⊙ τ_MTL.

When it fails: Thresholds are chosen task by task on held-out data in the paper; one default for all suits none of them well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.method import Method, PerModel, as_mask, per_model


@dataclass(frozen=True)
class Consensus(Method):
    """Task arithmetic on the elements that enough tasks find important.

    Attributes:
        threshold: λ_t, one for all models or one for each; the paper chooses among 0.2 … 0.6 on held-out data.
        agree: k; 2 removes what no task or one task alone needs.
        scale: α, the factor of the merged task vector.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    threshold: PerModel = 0.4
    agree: int = 2
    scale: float = 0.3

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        deltas = chunk.deltas()
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total += delta
        votes = torch.zeros_like(total)
        for delta, limit in zip(deltas, per_model(self.threshold, len(deltas), "threshold"), strict=True):
            votes += as_mask(delta.abs() > (total - delta).abs_().mul_(limit), votes.dtype)
        mask = as_mask(votes >= self.agree, total.dtype)
        return total.mul_(mask).mul_(self.scale).add_(chunk.base)
