"""MaTS: merging in the subspaces of the tasks, with Kronecker-factored Fisher matrices, by conjugate gradients.

Merging by matching models in task parameter subspaces (arXiv:2312.04339): with A_t = Gin_t ⊗ Gout_t, Gin_t the Gram matrix of a linear
layer's inputs and Gout_t that of the derivatives by its outputs, W solves Σ_t Gout_t W Gin_t = Σ_t Gout_t W_t Gin_t. The system is
never formed: conjugate gradients start at the average and stop at a relative residual of `tolerance`, or after `steps` (the
authors': 100 steps of SciPy's in float32, from task arithmetic, which need not converge). Means over rows, in float64.

Layers without both factors are averaged.

When it fails: Derivatives of an expert that fits its data are tiny, and the output factor is then noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk
from soups.merging.method import PerModel, WholeTensorMethod, per_model
from soups.merging.methods.linear import reduced
from soups.reduction import total_weight
from soups.stores.store import TensorMeta


@dataclass(frozen=True)
class MaTS(WholeTensorMethod):
    """W with Σ w_t Gout_t W Gin_t = Σ w_t Gout_t W_t Gin_t, by conjugate gradients; other tensors are averaged.

    Attributes:
        weight: w_t; one for all models or one for each.
        steps: of conjugate gradients, at most.
        tolerance: of the residual, relative to the right-hand side.
        ridge: a multiple of the identity that keeps unseen directions at the average, as a share of the operator's mean diagonal.
    """

    statistics: ClassVar[tuple[str, ...]] = ("gram", "kfac_out")
    weight: PerModel = 1.0
    steps: int = 100
    tolerance: float = 1e-8
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1.")

    def fits(self, kind: str, weight: TensorMeta, statistic: TensorMeta) -> bool:
        """Tell whether a factor belongs to a matrix (convolutions are averaged)."""
        shape = statistic.shape
        if len(shape) < 2 or shape[-1] != shape[-2]:
            return False
        return len(weight.shape) != 2 or shape[-1] in weight.shape

    def working_bytes(self, weight: TensorMeta, models: int, itemsize: int) -> int:
        """Return the bytes for a tensor of every model, all factors and six matrices in float64."""
        sides = sum(side**2 for side in weight.shape) if len(weight.shape) == 2 else 0
        return super().working_bytes(weight, models, itemsize) + 8 * (models * sides + 6 * weight.numel)

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged tensor, flat."""
        weights = per_model(self.weight, chunk.count)
        found = chunk.attached
        if len(chunk.shape) != 2 or "gram" not in found or "kfac_out" not in found:
            return reduced(weights, chunk, total_weight(weights))
        inner = [found.whole("gram", number) for number in range(chunk.count)]
        outer = [weight * found.whole("kfac_out", number) for number, weight in enumerate(weights)]
        transposed = found.transposed("gram") or chunk.shape[1] != len(inner[0])
        matrices = [model.double().view(chunk.shape) for model in chunk.models]
        matrices = [one.T if transposed else one for one in matrices]
        mean = sum((w * one for w, one in zip(weights, matrices, strict=True)), torch.zeros_like(matrices[0]))
        mean = mean / total_weight(weights)
        level = sum(
            (o.diagonal().mean() * i.diagonal().mean() for o, i in zip(outer, inner, strict=True)), mean.new_zeros(())
        )
        shift = self.ridge * level

        def operator(matrix: Tensor) -> Tensor:
            total = shift * matrix
            for o, i in zip(outer, inner, strict=True):
                total = total + o @ matrix @ i
            return total

        right = torch.zeros_like(mean)
        for o, i, one in zip(outer, inner, matrices, strict=True):
            right += o @ (one - mean) @ i
        result = mean + self._solve(operator, right)
        return (result.T if transposed else result).reshape(-1)

    def _solve(self, operator: Any, right: Tensor) -> Tensor:
        """Return x with operator(x) = right, by conjugate gradients from zero."""
        found = torch.zeros_like(right)
        residual, direction = right.clone(), right.clone()
        square = residual.square().sum()
        limit = self.tolerance**2 * square
        for _ in range(self.steps):
            if square <= limit or square == 0:
                break
            image = operator(direction)
            step = square / (direction * image).sum()
            found += step * direction
            residual -= step * image
            new = residual.square().sum()
            direction = residual + new / square * direction
            square = new
        return found
