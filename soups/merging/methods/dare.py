"""DARE: drop elements of the task vectors at random and scale up the rest, then merge by a sum or by TIES.

Language models are super Mario (arXiv:2311.03099), equation 3: τ̂ = (1 − m) ⊙ τ / (1 − p), m ~ Bernoulli(p); here the
density is 1 − p. The mask is a function of (seed, tensor, model, element) and of nothing else.

When it fails: Below a density of about 0.1 the rescaled noise outweighs the task vectors, the sooner the larger they are (long
fine-tuning, new vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.kernels import Choice
from soups.merging.method import PerModel, one_of
from soups.merging.noise import kept, masked_, rounded, to_draw
from soups.merging.stages import Elect, TaskVectors, mergekit_form
from soups.merging.transforms import Transform


@dataclass(frozen=True)
class Drop(Transform):
    """Keep each element with probability `density`, and divide by it if `rescale`.

    Attributes:
        density: one for all models or one for each.
        rescale: divide by the density, so that the expectation is the task vector.
        seed: of the masks.
    """

    revisits: ClassVar[bool] = False
    density: PerModel
    rescale: bool = True
    seed: int = 0

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Drop."""
        density = one_of(self.density, model, share="density")
        if density >= 1:
            return delta
        masked_(delta, kept(density, self.seed, chunk.key, model, chunk.start, delta.numel()))
        return delta.div_(rounded(density)) if self.rescale and density > 0 else delta

    def choice(self, seen: Any, chunk: Chunk, count: int, model: int) -> Choice:
        """Drop."""
        density = one_of(self.density, model, share="density")
        if density >= 1:
            return Choice()
        mask = to_draw(density, self.seed, chunk.key, model, chunk.start)
        return Choice(mask=mask, divisor=rounded(density) if self.rescale and density > 0 else 1.0)


def dare(
    *, density: PerModel = 0.5, weight: PerModel = 1.0, scale: float = 1.0, normalize: bool = False, seed: int = 0
) -> TaskVectors:
    """DARE, then a weighted sum.

    Args:
        density: the share of each task vector to keep, 1 − p.
        weight: one for all models or one for each.
        scale: λ, the factor of the merged task vector.
        normalize: divide the sum by Σ w_t.
        seed: of the masks.
    """
    return TaskVectors(Drop(density, seed=seed), weight, None, "mean" if normalize else "sum", scale)


def dare_ties(*, density: PerModel = 0.5, weight: PerModel = 1.0, scale: float = 1.0, seed: int = 0) -> TaskVectors:
    """DARE, then TIES' election and disjoint mean (without its trimming: DARE has dropped already)."""
    return TaskVectors(Drop(density, seed=seed), weight, Elect(), "mean", scale)


def dare_linear_mergekit(
    *,
    density: PerModel = 1.0,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `dare_linear`: the rescaling restores each tensor's L1 norm instead of dividing by the density."""
    drop = Drop(density, rescale=False, seed=seed)
    return mergekit_form(drop, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=False)


def dare_ties_mergekit(
    *,
    density: PerModel = 1.0,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `dare_ties`: as `dare_linear`, with an election in which weights vote."""
    drop = Drop(density, rescale=False, seed=seed)
    return mergekit_form(drop, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=True)
