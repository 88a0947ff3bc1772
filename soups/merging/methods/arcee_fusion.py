"""Arcee fusion: take over only those changes of one model that stand out.

mergekit's `arcee_fusion` (no paper): an element's importance is |τ| times the Kullback-Leibler divergence between the
softmaxes of its row in both models; changes of at least median + 1.5 · (interquartile range) are taken over.
Here the quartiles are exact at every size, where mergekit samples them from large tensors at random.

When it fails: It takes one model besides the base. A softmax over a row means little where rows are no logits or projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from soups.merging.chunk import Chunk, Unit
from soups.merging.method import Method, Scope
from soups.merging.operands import Operands
from soups.merging.selection import kth_largest


@dataclass(frozen=True)
class ArceeFusion(Method):
    """θ_0 + τ where its importance stands out."""

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    most: ClassVar[int | None] = 1

    @property
    def unit(self) -> Unit:
        """Softmaxes run over rows."""
        return "row"

    @property
    def scope(self) -> Scope:
        """Quartiles are of a tensor."""
        return "tensor"

    def observe(self, operands: Operands) -> float:
        """Return the least importance that is taken over."""
        count = operands.numel
        # mergekit's quartiles: the order statistics at the rounded-down places, none interpolated.
        ranks = [count - int(share * (count - 1)) for share in (0.25, 0.5, 0.75)]
        stream = lambda: (importance(chunk) for chunk in operands)  # noqa: E731
        first, median, third = kth_largest([stream], ranks, dtype=operands.dtype)
        return median + 1.5 * (third - first)

    def combine(self, chunk: Chunk, seen: float) -> Tensor:
        """Return the base with what stands out."""
        assert chunk.base is not None
        mask = (importance(chunk) >= seen).to(chunk.base.dtype)
        return (chunk.models[0] - chunk.base).mul_(mask).add_(chunk.base)


def importance(chunk: Chunk) -> Tensor:
    """Return |τ| · KL(softmax(θ_1) ‖ softmax(θ_0)), row by row, flat."""
    assert chunk.base is not None
    width = max(1, chunk.width)
    model, base = chunk.models[0].view(-1, width), chunk.base.view(-1, width)
    p, q = torch.softmax(model, dim=1) + 1e-8, torch.softmax(base, dim=1) + 1e-8
    divergence = (p * torch.log(p / q)).sum(dim=1, keepdim=True).clamp_(min=0)
    return ((model - base).abs_() * divergence).view(-1)
