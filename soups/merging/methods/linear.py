"""Weighted averages of whole models.

Model soups (arXiv:2203.05482), section 2; `passthrough` is one model, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging import kernels
from soups.merging.chunk import Chunk
from soups.merging.method import Method, PerModel, per_model
from soups.reduction import Sum, total_weight


@dataclass(frozen=True)
class Linear(Method):
    """θ = Σ w_i θ_i / Σ w_i, rounded by the rule of `soups.reduction`.

    When it fails: models that do not lie in one basin, because they did not start from one base model: their average is
    worse than each of them.

    Attributes:
        weight: one for all models or one for each.
        normalize: divide by the sum of the weights.
    """

    loops: ClassVar[bool] = True
    complex: ClassVar[bool] = True
    weight: PerModel = 1.0
    normalize: bool = True

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the weighted average."""
        weights = per_model(self.weight, chunk.count)
        divisor = total_weight(weights) if self.normalize else 1.0
        if abs(divisor) <= 1e-12 * sum(map(abs, weights)):
            raise ConfigError(
                f"The weights {weights} sum to zero, so they cannot be normalised. Set normalize=false for a difference."
            )
        return reduced(weights, chunk, divisor)


def reduced(weights: Sequence[float], chunk: Chunk, divisor: float = 1.0) -> Tensor:
    """Return Σ wᵢθᵢ / divisor of a chunk by the rule of `soups.reduction`: in the sum's dtype, or rounded as `chunk.into`."""
    stored = chunk.stored()
    if stored is not None and kernels.one_readable_dtype(stored[0]):
        return kernels.weighted_sum(stored[0], weights, chunk.size, divisor=divisor, into=chunk.into)
    total = Sum(torch.float64 if chunk.into == torch.float64 else None)
    for weight, values in zip(weights, chunk.each_stored(), strict=True):
        total.add(values, weight)
    return total.quotient(divisor)


@dataclass(frozen=True)
class Passthrough(Method):
    """θ = s · θ_1: a copy, or a scaled one; with slices in a configuration, layers from several models.

    When it fails: layers that never saw each other's outputs are stacked without training; each seam costs accuracy.

    Attributes:
        scale: s, the factor; none copies the model.
    """

    most: ClassVar[int | None] = 1
    loops: ClassVar[bool] = True
    complex: ClassVar[bool] = True
    scale: float | None = None

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the only model's chunk."""
        return reduced([1.0 if self.scale is None else self.scale], chunk)


@dataclass(frozen=True)
class Nearswap(Method):
    """Pull the base towards a model where the two are near each other, by at most t.

    w = clip(t / |θ_0 − θ_1|, 0, 1);  θ = (1 − w) θ_0 + w θ_1, element by element.

    When it fails: t is a length in weight space, so one value suits neither all layers nor two models of another scale.

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
