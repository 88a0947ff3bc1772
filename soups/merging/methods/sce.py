"""SCE: select elements by variance, calculate weights from energy, erase minority signs.

FuseChat (arXiv:2408.07990), section 3.3: elements whose variance over the task vectors is among the largest are kept; each
task vector weighs as its mean square within the tensor; elements against the sign of the sum are erased.

When it fails: Weights are squared norms: a model that moved far, by more steps or a higher rate, decides the merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from soups.merging.chunk import Chunk
from soups.merging.method import Method, Scope
from soups.merging.operands import Operands
from soups.merging.selection import Cut, exact_cut
from soups.merging.sums import BlockSum


@dataclass(frozen=True)
class SCE(Method):
    """θ_0 + Σ w_t m_t τ_t / Σ w_t m_t.

    Attributes:
        select_topk: the share of the elements of non-zero variance to keep.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    select_topk: float = 1.0

    @property
    def scope(self) -> Scope:
        """Selection and energy run over a tensor."""
        return "tensor"

    def observe(self, operands: Operands) -> tuple[Cut, list[float]]:
        """Find the variance cut, then each task vector's share of the energy."""
        cut = Cut(None)
        if self.select_topk < 1:
            varying = sum(int(torch.count_nonzero(variance(chunk.deltas()))) for chunk in operands)
            stream = lambda: (variance(chunk.deltas()) for chunk in operands)  # noqa: E731
            rank = int(varying * self.select_topk)
            cut = exact_cut(stream, [rank], operands.numel, dtype=operands.dtype, room=operands.room)[0]
        sums = [BlockSum() for _ in operands.models]
        for chunk in operands:
            for total, delta in zip(sums, self._selected(chunk, cut), strict=True):
                total.add(delta.square())
        energies = [total.value() / max(1, operands.numel) for total in sums]
        whole = sum(energies)
        return cut, [energy / whole if whole >= 1e-6 else 1 / len(sums) for energy in energies]

    def _selected(self, chunk: Chunk, cut: Cut) -> list[Tensor]:
        deltas = chunk.deltas()
        if cut.threshold is None:
            return deltas
        mask = cut.keep_(variance(deltas), chunk.start).sign_()
        return [delta.mul_(mask) for delta in deltas]

    def combine(self, chunk: Chunk, seen: tuple[Cut, list[float]]) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        cut, weights = seen
        deltas = self._selected(chunk, cut)
        vote = deltas[0].clone()
        for delta in deltas[1:]:
            vote += delta
        sign = vote.sign_().add_(0.5).sign_()
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, weights, strict=True):
            agreeing = relu(delta.mul_(sign))
            divisor += agreeing.sign().mul_(weight)
            total += agreeing.mul_(weight)
        return total.mul_(sign).div_(divisor.clamp_(min=1e-6)).add_(chunk.base)


def variance(tensors: list[Tensor]) -> Tensor:
    """Return the (population) variance over tensors, element by element."""
    mean = tensors[0].clone()
    for tensor in tensors[1:]:
        mean += tensor
    mean.div_(len(tensors))
    total = torch.zeros_like(mean)
    for tensor in tensors:
        total += (tensor - mean).square_()
    return total.div_(len(tensors))
