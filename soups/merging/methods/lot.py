"""LOT: the task vector that reproduces every expert's change on its own inputs, layer by layer.

LOT merging (arXiv:2505.23859, equations 9 and 12): with the Gram matrices G_t = X_tᵀX_t of the inputs of a linear layer, Wᵀ = W₀ᵀ + (Σ G_t)⁺ Σ G_t τ_tᵀ;
the scale of a norm layer moves by Σ s_t ⊙ τ_t / Σ s_t with s_t the sums of squared normalised inputs. It is RegMean for task
vectors: directions that no input takes stay the base model's, where RegMean's average does. The formulas were read in the paper's
pages and at second hand; the authors' code was not seen.

When it fails: As RegMean: the inputs of later layers are those of the experts, not of the merged model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.method import WholeTensorMethod
from soups.merging.methods.svd import average
from soups.stores.store import TensorMeta


@dataclass(frozen=True)
class LOT(WholeTensorMethod):
    """Wᵀ = W₀ᵀ + (Σ G_t)⁺ Σ G_t τ_tᵀ; norm scales by second moments; the task vectors of other tensors (grouped convolutions too) are averaged.

    Attributes:
        cutoff: eigenvalues of Σ G_t below this share of the largest count as zero.
        scale: factor of the merged task vector.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    statistics: ClassVar[tuple[str, ...]] = ("gram", "second_moment")
    cutoff: float = 1e-10
    scale: float = 1.0

    def fits(self, kind: str, weight: TensorMeta, statistic: TensorMeta) -> bool:
        """Tell whether a Gram (in, in) belongs to a layer's inputs, or a second moment (features,) to a scale."""
        shape = statistic.shape
        if kind == "second_moment":
            return shape == weight.shape
        if len(weight.shape) < 2 or len(shape) < 2 or shape[-1] != shape[-2]:
            return False
        inputs = weight.numel // weight.shape[0]
        return len(shape) == 3 or shape[-1] == inputs or (len(weight.shape) == 2 and shape[-1] == weight.shape[0])

    def working_bytes(self, weight: TensorMeta, models: int, itemsize: int) -> int:
        """Return the bytes for a tensor of every model, and in float64 for four Grams and three results."""
        inputs = max(weight.numel // weight.shape[0], weight.shape[0]) if weight.shape else 1
        return super().working_bytes(weight, models, itemsize) + 32 * (inputs**2 + weight.numel)

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged tensor, flat."""
        assert chunk.base is not None
        base = chunk.base.double()
        deltas = [delta.double() for delta in chunk.deltas()]
        grouped = "gram" in chunk.attached and len(chunk.attached.kinds["gram"][0].meta.shape) == 3
        if "gram" in chunk.attached and not grouped:
            merged = self._matrix(chunk, deltas)
        elif "second_moment" in chunk.attached:
            moments = [chunk.attached.whole("second_moment", number).reshape(-1) for number in range(chunk.count)]
            total = torch.stack(moments).sum(0)
            top = torch.stack([moment * delta for moment, delta in zip(moments, deltas, strict=True)]).sum(0)
            merged = torch.where(total > 0, top / total, torch.zeros_like(total))
        else:
            merged = average(deltas)
        return base + self.scale * merged

    def _matrix(self, chunk: Chunk, deltas: list[Tensor]) -> Tensor:
        grams = [chunk.attached.whole("gram", number) for number in range(chunk.count)]
        rows = chunk.shape[0]
        transposed = chunk.attached.transposed("gram") or deltas[0].numel() // rows != len(grams[0])
        columns = [delta.view(rows, -1) if transposed else delta.view(rows, -1).T for delta in deltas]
        left = torch.stack(grams).sum(0)
        right = torch.stack([gram @ one for gram, one in zip(grams, columns, strict=True)]).sum(0)
        values, vectors = torch.linalg.eigh(left)
        kept = values > self.cutoff * values.abs().max()
        inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
        found = vectors @ (inverse[:, None] * (vectors.T @ right))
        return (found if transposed else found.T).reshape(-1)
