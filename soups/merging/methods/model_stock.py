"""Model Stock: how far towards the fine-tunes' average the angle between them says to go.

Model Stock (arXiv:2403.19522), equation 7: t = N cos θ / (1 + (N − 1) cos θ);  w = t · mean(θ_i) + (1 − t) θ_0, tensor by
tensor. For more than two models the cosine is the mean over all pairs, as mergekit takes it; the paper has no code.

When it fails: It is for fine-tunes of one base on one task. Task vectors of different tasks are nearly orthogonal, and the result
falls back to the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from soups.merging.chunk import Chunk, Unit
from soups.merging.gram import GramMethod, Matrix, Vector, norms_and_units
from soups.merging.method import Scope, weighted_sum
from soups.merging.operands import Operands


@dataclass(frozen=True)
class ModelStock(GramMethod):
    """w = t · mean(θ_i) + (1 − t) θ_0 with t from the mean cosine between task vectors.

    Attributes:
        filter_wise: one t for each row, instead of one for the tensor.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    least: ClassVar[int] = 2
    filter_wise: bool = False

    @property
    def unit(self) -> Unit:
        """Rows, if each has its own t."""
        return "row" if self.filter_wise else "element"

    @property
    def scope(self) -> Scope:
        """A row or the tensor."""
        return "row" if self.filter_wise else "tensor"

    def observe(self, operands: Operands) -> Any:
        """Find the tensor's t; rows need nothing beforehand."""
        return None if self.filter_wise else super().observe(operands)

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk."""
        if not self.filter_wise:
            return super().combine(chunk, seen)
        assert chunk.base is not None
        rows = [delta.view(-1, max(1, chunk.width)) for delta in chunk.deltas()]
        count = len(rows)
        units = [row / row.norm(dim=1, keepdim=True).clamp_(min=1e-8) for row in rows]
        pairs = [(units[i] * units[j]).sum(dim=1, keepdim=True) for i in range(count) for j in range(i)]
        cosine = weighted_sum([1.0] * len(pairs), pairs).div_(len(pairs))
        divisor = 1 + (count - 1) * cosine
        t = torch.where(divisor < 1e-6, torch.zeros_like(divisor), count * cosine / divisor)
        return weighted_sum([1.0] * count, rows).div_(count).mul_(t).view(-1).add_(chunk.base)

    def coefficients(self, gram: Matrix) -> Vector:
        """Return t / N for each task vector."""
        count = len(gram)
        units = norms_and_units(gram)[1]
        cosine = float((units.sum() - np.trace(units)) / (count * (count - 1)))
        divisor = 1 + (count - 1) * cosine
        t = 0.0 if divisor < 1e-6 else count * cosine / divisor
        return np.full(count, t / count)
