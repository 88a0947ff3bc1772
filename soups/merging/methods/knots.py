"""KnOTS: bring the task vectors of a matrix into one basis before they are merged.

Model merging with SVD to tie the knots (arXiv:2410.19735), section 4: [τ_1 … τ_T] = U S [V_1ᵀ … V_Tᵀ]; the V_t, which now
mean the same directions, are merged (here by TIES, as in the paper's best results), and θ = θ_0 + λ U S V_mergedᵀ. Meant for
LoRA, whose task vectors have few directions; a linear merge of the V_t would change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from soups.merging.methods.svd import MatrixMethod, svd
from soups.merging.selection import tensor_cut


@dataclass(frozen=True)
class KnOTS(MatrixMethod):
    """θ_0 + λ U S (TIES of V_t)ᵀ.

    Attributes:
        density: the share of each V_t to keep.
        scale: λ.
        exclude: names to average.
    """

    density: float = 0.2
    scale: float = 1.0
    exclude: tuple[str, ...] = ()

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Merge matrices, shape (m, n) each."""
        columns = deltas[0].shape[1]
        u, s, vt = svd(torch.cat(deltas, dim=1))
        # Directions without weight hold noise that would take part in the trimming.
        rank = int((s > s[0] * max(vt.shape) * torch.finfo(s.dtype).eps).sum())
        parts = [self._trimmed(part) for part in vt[:rank].split(columns, dim=1)]
        sign = torch.stack(parts).sum(0).sign_()
        agreeing = [relu(part * sign) for part in parts]
        count = torch.stack([part.sign() for part in agreeing]).sum(0).clamp_(min=1)
        merged = torch.stack(agreeing).sum(0).mul_(sign).div_(count)
        return (u[:, :rank] * s[:rank]) @ merged

    def _trimmed(self, part: Tensor) -> Tensor:
        flat = part.reshape(-1)
        size = flat.numel()
        rank = size if self.density >= 1 else max(1, int(self.density * size))
        (cut,) = tensor_cut(lambda: [flat.abs()], [rank], size, dtype=flat.dtype, room=size)
        return cut.keep(flat).view(part.shape)
