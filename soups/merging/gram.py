"""Methods whose answer lies in the span of their inputs: one pass for the inner products, tiny algebra, one pass to sum.

SLERP, its generalisations, the Karcher mean and Model Stock all have the form θ = c_0 θ_0 + Σ c_i x_i, where x are models or
task vectors and the coefficients depend on the inner products ⟨x_i, x_j⟩ alone. So none of them needs a tensor in memory,
and iterations (Karcher's) cost nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.kernels import Row
from soups.merging.method import Method, Scope, weighted_sum
from soups.merging.operands import Operands
from soups.merging.sums import BLOCK

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


class GramMethod(Method):
    """A method given by `coefficients(gram)`.

    Attributes:
        centred: whether x are task vectors, with the base added at the end; `None` means: if there is a base.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "optional"

    @property
    def scope(self) -> Scope:
        """Inner products run over a tensor."""
        return "tensor"

    @abstractmethod
    def coefficients(self, gram: Matrix) -> Vector:
        """Return c_i, given ⟨x_i, x_j⟩ of one tensor in float64."""

    def vectors(self, chunk: Chunk) -> list[Tensor]:
        """Return x: task vectors when there is a base, else the models."""
        return chunk.directions()

    def observe(self, operands: Operands) -> Vector:
        """Compute the inner products, then the coefficients."""
        gram = inner_products(operands, self.vectors)
        return self.coefficients(gram.numpy())

    def combine(self, chunk: Chunk, seen: Vector) -> Tensor:
        """Return c_0 θ_0 + Σ c_i x_i."""
        total = weighted_sum([float(c) for c in seen], self.vectors(chunk))
        return total if chunk.base is None else total.add_(chunk.base)


def inner_products(operands: Operands, vectors: Callable[[Chunk], list[Tensor]] = Chunk.directions) -> Tensor:
    """Return ⟨x_i, x_j⟩ over one tensor, (N, N) in float64; x are task vectors where there is a base, else the models.

    Args:
        operands: the tensor in all models.
        vectors: gives x from a chunk.
    """
    count = len(vectors(_empty(operands)))
    gram = torch.zeros(count, count, dtype=torch.float64)
    for chunk in operands:
        stacked = torch.stack(vectors(chunk)).double()
        # Block by block in order, every product of the same shape: the bits do not depend on the chunk.
        for block in stacked.split(BLOCK, dim=1):
            block = block.contiguous()
            gram += (block @ block.T).cpu()
    return gram


class _Nothing(NamedTuple):
    models: int

    def read(self, model: int, shared: bool) -> Tensor:
        return torch.zeros(0)

    def raw(self, model: int) -> Tensor:
        return torch.zeros(0)

    def subtract(self, base: Tensor) -> Tensor:
        return torch.zeros(self.models, 0)

    def stored(self) -> list[Row] | None:
        return None

    def delta(self, model: int, base: Tensor) -> Tensor:
        return torch.zeros(0)


def _empty(operands: Operands) -> Chunk:
    count = len(operands.models)
    has_base = operands.base is not None
    return Chunk(operands.key, 0, 0, operands.shape, count, _Nothing(count), has_base=has_base)


def norms_and_units(gram: Matrix, floor: float = 1e-8) -> tuple[Vector, Matrix]:
    """Return |x_i| and the inner products of the unit vectors; zero vectors stay zero."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    safe = np.maximum(norms, floor)
    return norms, gram / safe[:, None] / safe[None, :]
