"""RAM: average what several task vectors change, keep what one alone changes.

Behavior Knowledge Merge in Reinforced Agentic Models (arXiv:2601.13572): fine-tuning by reinforcement learning changes few
elements, and others in each model, so that a mean over models dilutes them. An element is changed where |τ_t| > ε. Changed by
one model alone it keeps its τ_t, changed by several it is their mean. RAM+ also multiplies a model's own elements by
λ_t = 1 + r · min(α, shared_t / own_t), counts of its changed elements, to make up for the shared part that is averaged.

When it fails: `epsilon` decides what counts as changed. In bfloat16 rounding alone can exceed it, and then every element is
changed by all models, which is a plain mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk
from soups.merging.method import Scope, WholeModelMethod, as_mask
from soups.merging.operands import Operands
from soups.merging.selection import Map


@dataclass(frozen=True)
class RAM(WholeModelMethod):
    """Keep what one task vector alone changes, average what several change.

    Attributes:
        r: how strongly a model's own elements are scaled up; 0 leaves them (RAM), `ram_plus` has 0.1.
        alpha: α, the most that the ratio of shared to own elements counts.
        epsilon: ε, the magnitude above which an element counts as changed.
        local: count within each tensor instead of over the whole model.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    r: float = 0.0
    alpha: float = 0.2
    epsilon: float = 1e-5
    local: bool = False

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.alpha < 0:
            raise ConfigError(f"epsilon={self.epsilon} and alpha={self.alpha} must not be negative.")

    @property
    def scope(self) -> Scope:
        """Plain RAM is element-wise; the factors of RAM+ depend on counts."""
        if self.r == 0:
            return "element"
        return "tensor" if self.local else "model"

    def observe(self, operands: Operands) -> list[float]:
        """Return the factor λ_t of each model, from one tensor."""
        return self._factors([operands])

    def observe_all(self, operands: Sequence[Operands], map: Map) -> list[float]:
        """Return the factor λ_t of each model, from all tensors."""
        return self._factors(operands)

    def _factors(self, operands: Sequence[Operands]) -> list[float]:
        models = len(operands[0].models)
        own, shared = [0] * models, [0] * models
        for one in operands:
            for chunk in one:
                masks, count = self._changed(chunk.deltas())
                alone = as_mask(count == 1, count.dtype)
                for model, mask in enumerate(masks):
                    changed = int(torch.count_nonzero(mask))
                    single = int(torch.count_nonzero(mask * alone))
                    own[model] += single
                    shared[model] += changed - single
        return [1 + self.r * min(self.alpha, both / one) if one else 1.0 for one, both in zip(own, shared, strict=True)]

    def _changed(self, deltas: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return ones where each task vector is changed, and by how many each element is."""
        masks = [as_mask(delta.abs() > self.epsilon, delta.dtype) for delta in deltas]
        count = masks[0].clone()
        for mask in masks[1:]:
            count += mask
        return masks, count

    def combine(self, chunk: Chunk, seen: list[float] | None) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        deltas = chunk.deltas()
        masks, count = self._changed(deltas)
        total = torch.zeros_like(count)
        for model, (delta, mask) in enumerate(zip(deltas, masks, strict=True)):
            factor = 1.0 if seen is None else seen[model]
            kept = delta * mask
            if factor != 1:
                kept = torch.where(count == 1, kept * factor, kept)
            total += kept
        return total.div_(count.clamp_(min=1)).add_(chunk.base)


def ram_plus(*, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> RAM:
    """RAM+: as RAM, with each model's own elements scaled up by its share of averaged ones, over the whole model.

    Args:
        r: how strongly a model's own elements are scaled up.
        alpha: α, the most that the ratio of shared to own elements counts.
        epsilon: ε, the magnitude above which an element counts as changed.
    """
    return RAM(r=r, alpha=alpha, epsilon=epsilon)


def ram_plus_mergekit(*, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> RAM:
    """mergekit's `ramplus_tl`: RAM+ with elements counted within each tensor.

    Args:
        r: how strongly a model's own elements are scaled up.
        alpha: α, the most that the ratio of shared to own elements counts.
        epsilon: ε, the magnitude above which an element counts as changed.
    """
    return RAM(r=r, alpha=alpha, epsilon=epsilon, local=True)
