"""RegMean: matrices that reproduce, on every model's own inputs, what that model's matrix makes of them.

Dataless knowledge fusion by merging weights (arXiv:2212.09849), equation 2: with G_t = X_tᵀX_t over the inputs X_t of a linear
layer and W_t of shape (out, in), Wᵀ = (Σ w_t G̃_t)⁻¹ Σ w_t G̃_t W_tᵀ minimises Σ w_t |X_t Wᵀ − X_t W_tᵀ|². G̃_t is G_t with
its off-diagonal elements times `off_diagonal` (section 4.2). Grams are means over rows (`gram` statistics).

The system is solved in float64 by Cholesky's method, for the difference from the plain average, with a small multiple of the
identity added: directions in which no data lie keep the average. (The authors' code inverts in float32, without one.)

When it fails: Later layers of the merged model see other inputs than those that each expert's Grams were taken from. Grams of few
rows say nothing about most directions, which keep the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.merging.chunk import Chunk
from soups.merging.method import PerModel, WholeTensorMethod, per_model
from soups.merging.methods.linear import reduced
from soups.reduction import Sum, total_weight
from soups.stores.store import TensorMeta


@dataclass(frozen=True)
class RegMean(WholeTensorMethod):
    """Wᵀ = (Σ w_t G̃_t + εI)⁻¹ (Σ w_t G̃_t W_tᵀ + ε W̄ᵀ); tensors without Grams are averaged.

    Attributes:
        weight: w_t; one for all models or one for each.
        off_diagonal: what the Grams' off-diagonal elements are multiplied by; the paper takes 0.9, and 0.1 for T5.
        ridge: ε as a share of the mean diagonal of Σ w_t G̃_t.
    """

    statistics: ClassVar[tuple[str, ...]] = ("gram",)
    weight: PerModel = 1.0
    off_diagonal: float = 0.9
    ridge: float = 1e-6

    def fits(self, kind: str, weight: TensorMeta, statistic: TensorMeta) -> bool:
        """Tell whether a Gram, (in, in) or (groups, in, in), belongs to the inputs of a weight."""
        shape = statistic.shape
        if len(weight.shape) < 2 or len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            return False
        if len(shape) == 3 and weight.shape[0] % shape[0]:
            return False
        inputs = weight.numel // weight.shape[0]
        return shape[-1] in ({inputs} if len(weight.shape) > 2 or len(shape) == 3 else {inputs, weight.shape[0]})

    def working_bytes(self, weight: TensorMeta, models: int, itemsize: int) -> int:
        """Return the bytes for a tensor of every model, and in float64 for three Grams and three results."""
        inputs = max(weight.numel // max(1, weight.shape[0]), weight.shape[0]) if weight.shape else 1
        return super().working_bytes(weight, models, itemsize) + 24 * (inputs**2 + weight.numel)

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged tensor, flat, in float64 where there are Grams."""
        weights = per_model(self.weight, chunk.count)
        if "gram" not in chunk.attached:
            return reduced(weights, chunk, total_weight(weights))
        average = Sum(torch.float64)
        for weight, model in zip(weights, chunk.models, strict=True):
            average.add(model, weight)
        mean = average.quotient(total_weight(weights))
        inputs = chunk.attached.kinds["gram"][0].meta.shape[-1]
        transposed = chunk.attached.transposed("gram") or (len(chunk.shape) == 2 and chunk.shape[1] != inputs)
        left: Tensor | None = None
        right: Tensor | None = None
        for number, (weight, model) in enumerate(zip(weights, chunk.models, strict=True)):
            gram = chunk.attached.whole("gram", number)
            gram = gram.view(-1, *gram.shape[-2:]) * weight
            diagonal = gram.diagonal(dim1=-2, dim2=-1).clone()
            gram.mul_(self.off_diagonal).diagonal(dim1=-2, dim2=-1).copy_(diagonal)
            product = gram @ _columns(model.double() - mean, chunk, gram, transposed)
            left = gram if left is None else left.add_(gram)
            right = product if right is None else right.add_(product)
        assert left is not None
        assert right is not None
        diagonal = left.diagonal(dim1=-2, dim2=-1)
        level = diagonal.mean(-1, keepdim=True)
        # A layer that no input reached keeps the average.
        diagonal.add_(torch.where(level == 0, torch.ones_like(level), self.ridge * level.abs()))
        factor, failed = torch.linalg.cholesky_ex(left)
        if bool(failed.any()):
            raise WeightsError(
                f"The Gram matrices of {chunk.key!r} have no Cholesky factor: they are not symmetric and positive, or "
                f"ridge={self.ridge} is too small for their rank."
            )
        change = torch.cholesky_solve(right, factor)
        return mean + _flat(change, chunk, transposed)


def _columns(values: Tensor, chunk: Chunk, gram: Tensor, transposed: bool) -> Tensor:
    """Return a weight as (groups, in, out)."""
    if transposed:
        return values.view(1, *chunk.shape)
    return values.view(len(gram), -1, gram.shape[-1]).transpose(1, 2)


def _flat(columns: Tensor, chunk: Chunk, transposed: bool) -> Tensor:
    """Return (groups, in, out) as the weight's elements in their order."""
    return columns.reshape(-1) if transposed else columns.transpose(1, 2).reshape(-1)
