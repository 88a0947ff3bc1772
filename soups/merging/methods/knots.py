"""KnOTS: bring the task vectors of a matrix into one basis before they are merged.

Model merging with SVD to tie the knots (arXiv:2410.19735), section 4: [τ_1 … τ_T] = U S [V_1ᵀ … V_Tᵀ]; the S V_tᵀ, which now
mean the same directions, are merged by TIES, and θ = θ_0 + λ U (TIES of S V_tᵀ). Meant for LoRA, whose task vectors have few
directions; a linear merge of the V_t would change nothing.

As in the authors' code, S stands with V_t before trimming, directions with singular values up to 1e-5 are left out, the
share to keep is of all matrices of a task together (int(density · n) + 1 elements and those equal to the last), and signs
are elected by sums. There a sum of zero takes the majority's sign; here nobody agrees. Other tensors, which the authors
leave out, are averaged.

When it fails: Task vectors of full rank leave nothing to align, and the SVD of all of them side by side takes memory and time that
grow with the number of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.method import Scope, WholeModelMethod
from soups.merging.methods.svd import MatrixMethod, average, svd
from soups.merging.operands import Operands
from soups.merging.selection import Cut, Map, kth_of_each

_SMALLEST = 1e-5


@dataclass(frozen=True)
class KnOTS(MatrixMethod, WholeModelMethod):
    """θ_0 + λ U (TIES of S V_tᵀ).

    Attributes:
        density: the share of each task's S V_t to keep, over the whole model.
        scale: λ; the authors choose it on held-out data, 0.6 for ViT-B/32.
        exclude: names to average.
    """

    density: float = 0.2
    scale: float = 1.0
    exclude: tuple[str, ...] = ()

    @property
    def scope(self) -> Scope:
        """Trimming is over the whole model."""
        return "model"

    def observe_all(self, operands: Sequence[Operands], map: Map) -> list[Cut]:
        """Find the magnitude that each task is trimmed at."""
        matrices = [one for one in operands if self.eligible(one)]
        count = len(operands[0].models)
        if self.density >= 1 or not matrices:
            return [Cut(None)] * count
        dtype = torch.float64 if any(one.dtype == torch.float64 for one in matrices) else torch.float32

        def parts(one: Operands) -> list[Tensor]:
            (chunk,) = one
            found = _tied([delta.view(one.shape) for delta in chunk.deltas()])
            none = torch.empty(0, dtype=dtype)
            return [none] * count if found is None else [part.abs().reshape(-1).to(dtype) for part in found[1]]

        def rank(total: int) -> int:
            return max(1, min(total, int(self.density * total) + 1))

        return [Cut(limit) for limit in kth_of_each(parts, matrices, rank, count=count, dtype=dtype, map=map)]

    def merge_matrices(self, deltas: list[Tensor], cuts: Sequence[Cut] = ()) -> Tensor:
        """Merge matrices, shape (m, n) each, trimmed at `cuts`."""
        found = _tied(deltas)
        if found is None:
            return torch.zeros_like(deltas[0])
        basis, parts = found
        trimmed = [cut.keep_(part) for part, cut in zip(parts, cuts or [Cut(None)] * len(parts), strict=True)]
        sign = torch.stack(trimmed).sum(0).sign_()
        agreeing = [(part * sign).relu_() for part in trimmed]
        count = torch.stack([part.sign() for part in agreeing]).sum(0).clamp_(min=1)
        return basis @ torch.stack(agreeing).sum(0).mul_(sign).div_(count)

    def combine(self, chunk: Chunk, seen: Sequence[Cut]) -> Tensor:
        """Return the merged tensor, flat."""
        assert chunk.base is not None
        deltas = chunk.deltas()
        if not self.eligible(chunk):
            return average(deltas).mul_(self.scale).add_(chunk.base)
        merged = self.merge_matrices([delta.view(chunk.shape) for delta in deltas], seen)
        return merged.reshape(-1).mul_(self.scale).add_(chunk.base)


def _tied(deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
    """Return U (m, r) and each S V_tᵀ (r, n); `None` where no model has changed the matrix."""
    if not any(bool(delta.any()) for delta in deltas):
        return None
    u, s, vt = svd(torch.cat(list(deltas), dim=1), torch.float64)
    rank = int((s > _SMALLEST).sum())
    if rank == 0:
        return None
    dtype = deltas[0].dtype
    weighted = (s[:rank, None] * vt[:rank]).to(dtype)
    return u[:, :rank].to(dtype), list(weighted.split(deltas[0].shape[1], dim=1))
