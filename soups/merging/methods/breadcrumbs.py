"""Model Breadcrumbs: drop the outliers and the small change of each task vector, keep the middle.

Model Breadcrumbs (arXiv:2312.06795), section 3: of each layer's |τ| the largest share γ is removed, the next largest
`density` is kept, the rest is removed.

When it fails: `gamma` removes the largest changes, which are the task itself where few elements learn most of it. In tensors of
fewer than 1 / gamma elements it removes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soups.merging.chunk import Chunk, Unit
from soups.merging.kernels import Choice
from soups.merging.method import PerModel, one_of
from soups.merging.operands import Operands
from soups.merging.selection import Cut
from soups.merging.stages import TaskVectors, mergekit_form
from soups.merging.transforms import Transform, tensor_cuts


@dataclass(frozen=True)
class Band(Transform):
    """Keep a band of magnitudes.

    Attributes:
        density: the share to keep, one for all models or one for each.
        gamma: the share of largest magnitudes to remove.
        within: what the shares are of: each tensor, or each row as the authors' code has it. In a tensor fewer of the
            largest are removed where the density would not be reached; in a row fewer elements are kept.
    """

    density: PerModel
    gamma: PerModel = 0.01
    within: Literal["tensor", "row"] = "tensor"

    @property
    def unit(self) -> Unit:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows must be whole where shares are of rows."""
        return "row" if self.within == "row" else "element"

    @property
    def scope(self) -> Literal["tensor", "row"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `within`."""
        return self.within

    def _counts(self, model: int, total: int) -> tuple[int, int]:
        density, gamma = one_of(self.density, model), one_of(self.gamma, model)
        kept = min(int(density * total), total)
        top = int(gamma * total)
        return (top if self.within == "row" else min(top, total - kept)), kept

    def observe(self, operands: Operands) -> Sequence[list[Cut] | None]:
        """Find where the outliers end and where the band ends, in each model."""
        if self.within == "row":
            return super().observe(operands)
        counts = [self._counts(model, operands.numel) for model in range(len(operands.models))]
        return [
            tensor_cuts(operands.only(model), [top, top + kept], exact=True) for model, (top, kept) in enumerate(counts)
        ]

    def apply(self, delta: Tensor, seen: list[Cut], chunk: Chunk, model: int) -> Tensor:
        """Set everything outside the band to zero."""
        if self.within == "row":
            return self._apply_rows(delta, chunk, model)
        outliers, upper = seen
        largest = outliers.keep_(delta.clone(), chunk.start)
        # Both hold the same numbers or zeros, so the difference is exact.
        return upper.keep_(delta, chunk.start).sub_(largest)

    def choice(self, seen: list[Cut], chunk: Chunk, count: int, model: int) -> Choice | None:
        """Set everything outside the band to zero, if it is the tensor's."""
        if self.within == "row":
            return None
        outliers, upper = (cut.limits(count, chunk.start) for cut in seen)
        return Choice((*upper[:2], *outliers[:2]), (upper[2], outliers[2]))

    def _apply_rows(self, delta: Tensor, chunk: Chunk, model: int) -> Tensor:
        if not chunk.shape:  # a number is no row, and is left as it is
            return delta
        rows = delta.view(-1, max(1, chunk.width))
        width = rows.shape[1]
        top, kept = self._counts(model, width)
        # Exactly so many of each row, the earlier of equal magnitudes first.
        order = rows.abs().sort(dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(rows).scatter_(1, order[:, top : top + kept], 1.0)
        return rows.mul_(mask).view(-1)


def breadcrumbs(
    *, density: PerModel = 0.9, gamma: PerModel = 0.01, weight: PerModel = 1.0, scale: float = 0.3
) -> TaskVectors:
    """The paper's Breadcrumbs: the middle of each layer's task vector, summed.

    Args:
        density: the share to keep.
        gamma: the share of outliers to remove.
        weight: one for all models or one for each.
        scale: λ, the factor of the merged task vector.
    """
    return TaskVectors(Band(density, gamma), weight, None, "sum", scale)


def breadcrumbs_official(
    *, density: PerModel = 0.15, gamma: PerModel = 0.006, weight: PerModel = 1.0, scale: float = 0.2
) -> TaskVectors:
    """The authors' code: shares are of each row, and these are its starting values."""
    return TaskVectors(Band(density, gamma, within="row"), weight, None, "sum", scale)


def breadcrumbs_mergekit(
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
) -> TaskVectors:
    """mergekit's `breadcrumbs`; where γ · n is below one nothing is removed at the top, and nothing is lost.

    Args:
        density: the share to keep.
        gamma: the share of outliers to remove.
        weight: one for all models or one for each.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights.
        rescale: restore each task vector's L1 norm.
    """
    band = Band(density, gamma)
    return mergekit_form(band, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=False)


def breadcrumbs_ties_mergekit(
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
) -> TaskVectors:
    """mergekit's `breadcrumbs_ties`: the same, with an election in which weights vote.

    Args:
        density: the share to keep.
        gamma: the share of outliers to remove.
        weight: one for all models or one for each; they vote.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights of those that agree.
        rescale: restore each task vector's L1 norm.
    """
    band = Band(density, gamma)
    return mergekit_form(band, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=True)
