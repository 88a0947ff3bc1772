"""BitDelta: the sign of each element of a task vector, and one scale for each matrix.

BitDelta: your fine-tune may only be worth one bit (arXiv:2402.10193), section 3.1: τ̂ = α ⊙ sign(τ) with α = mean |τ|, which
minimises |τ − τ̂|². Only matrices are reduced; biases, norms and other tensors of one axis are kept as they are. The paper
then trains the scales by distillation (section 3.2), which is not done here. An element that did not move counts as −1, as in
the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soups.artifacts.method import PartMethod, Piece, Pieces, packed_bits
from soups.merging.operands import Operands
from soups.merging.sums import BlockSum
from soups.stores.store import TensorMeta


@dataclass(frozen=True)
class BitDelta(PartMethod):
    """One bit an element of a matrix, and one float32 scale a matrix."""

    def part(self, meta: TensorMeta) -> dict[str, TensorMeta] | None:
        """Return signs and scale of a tensor of two axes or more."""
        if len(meta.shape) < 2:
            return None
        return {"signs": packed_bits(meta.numel), "scale": TensorMeta((), torch.float32)}

    def encode(self, operands: Operands) -> Iterator[Piece]:
        """Yield the signs chunk by chunk, then the scale."""
        sums = [BlockSum(operands.block) for _ in operands.models]
        for chunk in operands:
            for task, delta in enumerate(chunk.deltas()):
                sums[task].add(delta.abs())
                bits = np.packbits(delta.cpu().numpy() > 0, bitorder="little")
                yield Piece(task, "signs", chunk.start // 8, torch.from_numpy(bits))
        for task, total in enumerate(sums):
            yield Piece(task, "scale", 0, torch.tensor([total.value() / max(1, operands.numel)], dtype=torch.float32))

    def decode(self, shared: Pieces, own: Pieces, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Return ±scale."""
        del shared, meta
        first = start // 8
        packed = own.read("signs", first, -(-stop // 8)).numpy()
        bits = np.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first]
        return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1).mul_(own.read("scale"))
