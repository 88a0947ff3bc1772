"""Fisher merging: each element is averaged with the Fisher information that each model's data give it.

Merging models with Fisher-weighted averaging (arXiv:2111.09832), equation 2: θ = Σ λ_t F_t θ_t / Σ λ_t F_t, element by
element, F_t the diagonal of model t's Fisher information (the mean over examples; `fisher` statistics). The authors' code
also divides λ_t by the norm of F_t over the whole model, which `normalize` does. An element that no data move (the biases of
attention keys, for example, which softmax cancels) has a Fisher information of rounding noise: F_t is raised to `floor`
times its largest element, so that such elements are averaged plainly.

When it fails: A diagonal knows nothing of how elements act together, so linear layers merge better by `regmean`. Fisher information
from few examples is noise, which weighs elements at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.method import PerModel, Scope, WholeModelMethod, per_model
from soups.merging.methods.linear import reduced
from soups.merging.operands import Operands
from soups.merging.selection import Map
from soups.merging.sums import BlockSum
from soups.reduction import total_weight


class Shares(NamedTuple):
    """What a look at one model's Fisher information found.

    Attributes:
        floor: the least value that an element counts with.
        coefficient: λ_t, divided by the norm where that is asked for.
    """

    floor: float
    coefficient: float


@dataclass(frozen=True)
class Fisher(WholeModelMethod):
    """θ = Σ λ_t F_t θ_t / Σ λ_t F_t; tensors without Fisher information are averaged with the weights λ_t.

    Attributes:
        weight: λ_t; one for all models or one for each.
        floor: elements of F_t below this share of the model's largest are raised to it.
        normalize: divide λ_t by the norm of F_t over the whole model, as the authors' code does.
    """

    statistics: ClassVar[tuple[str, ...]] = ("fisher",)
    weight: PerModel = 1.0
    floor: float = 1e-8
    normalize: bool = False

    @property
    def scope(self) -> Scope:
        """The largest element and the norm are those of the whole model."""
        return "model"

    def observe_all(self, operands: Sequence[Operands], map: Map) -> list[Shares]:
        """Find each model's largest element and norm."""
        count = len(operands[0].models)
        covered = [one for one in operands if "fisher" in one.attached]
        looks = list(map(_look, covered))
        shares: list[Shares] = []
        for model, weight in enumerate(per_model(self.weight, count)):
            largest = max((look[model][0] for look in looks), default=0.0)
            norm = math.sqrt(math.fsum(look[model][1] for look in looks))
            shares.append(Shares(self.floor * largest, weight / norm if self.normalize and norm > 0 else weight))
        return shares

    def combine(self, chunk: Chunk, seen: list[Shares]) -> Tensor:
        """Return the merged chunk, in float64 where there is Fisher information."""
        weights = per_model(self.weight, chunk.count)
        if "fisher" not in chunk.attached:
            return reduced(weights, chunk, total_weight(weights))
        models = [model.double() for model in chunk.models]
        top, bottom = torch.zeros_like(models[0]), torch.zeros_like(models[0])
        plain = torch.zeros_like(models[0])
        for model, fisher, weight, share in zip(models, chunk.statistics("fisher"), weights, seen, strict=True):
            importance = fisher.clamp_(min=share.floor).mul_(share.coefficient)
            bottom += importance
            top += importance * model
            plain += model * (weight / total_weight(weights))
        return torch.where(bottom == 0, plain, top / bottom)


def _look(operands: Operands) -> list[tuple[float, float]]:
    """Return each model's largest Fisher information in one tensor, and the sum of its squares."""
    squares = [BlockSum(operands.block) for _ in operands.models]
    largest = [0.0] * len(squares)
    for start, stop in operands.spans():
        for model, values in enumerate(operands.attached.stretches("fisher", start, stop)):
            if values.numel():
                largest[model] = max(largest[model], float(values.max()))
            squares[model].add(values.square())
    return [(peak, total.value()) for peak, total in zip(largest, squares, strict=True)]
