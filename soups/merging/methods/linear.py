"""Weighted averages of whole models.

Model soups (arXiv:2203.05482), section 2; `passthrough` is one model, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from soups.errors import ConfigError
from soups.merging import kernels
from soups.merging.method import Method, per_model, running_sum
from soups.merging.operands import Chunk


@dataclass(frozen=True)
class Linear(Method):
    """θ = Σ w_i θ_i / Σ w_i.

    Attributes:
        weight: one for all models or one for each.
        normalize: divide by the sum of the weights.
    """

    loops: ClassVar[bool] = True
    weight: float | Sequence[float] = 1.0
    normalize: bool = True

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the weighted average."""
        weights = per_model(self.weight, chunk.count)
        divisor = sum(weights)
        if len(set(weights)) == 1 and divisor != 0:  # one multiplication, not one a model
            factor = 1 / len(weights) if self.normalize else weights[0]
            return _sum(chunk, [1.0] * len(weights), factor=factor)
        if not self.normalize or divisor == 1:
            return _sum(chunk, weights)
        if divisor == 0:
            raise ConfigError(
                f"The weights {weights} sum to zero, so they cannot be normalised. Set normalize=false for a difference."
            )
        return _sum(chunk, weights, divisor=divisor)


def _sum(chunk: Chunk, weights: Sequence[float], *, factor: float = 1.0, divisor: float = 1.0) -> Tensor:
    """Return Σ w_i θ_i · factor / divisor."""
    if (stored := chunk.stored()) is not None:
        return kernels.weighted_sum(stored[0], weights, chunk.size, factor=factor, divisor=divisor, into=chunk.into)
    total = running_sum(weights, chunk.each())
    if factor != 1:
        total.mul_(factor)
    return total if divisor == 1 else total.div_(divisor)


@dataclass(frozen=True)
class Passthrough(Method):
    """θ = s · θ_1: a copy, or a scaled one; with mergekit's slices, layers from several models (a frankenmerge).

    Attributes:
        scale: s.
    """

    most: ClassVar[int | None] = 1
    scale: float | None = None

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the only model's chunk."""
        (model,) = chunk.models
        return model if self.scale in (None, 1) else model.mul_(self.scale)


@dataclass(frozen=True)
class Nearswap(Method):
    """Pull the base towards a model where the two are near each other, by at most t.

    w = clip(t / |θ_0 − θ_1|, 0, 1);  θ = (1 − w) θ_0 + w θ_1, element by element.

    Attributes:
        t: how far: differences of at most t are taken over whole.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    most: ClassVar[int | None] = 1
    t: float = 1e-3

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the base, pulled."""
        assert chunk.base is not None
        (model,) = chunk.models
        share = (chunk.base - model).abs_().clamp_(min=1e-6).reciprocal_().mul_(self.t).clamp_(0, 1)
        return model.mul_(share).add_(share.neg_().add_(1).mul_(chunk.base))
