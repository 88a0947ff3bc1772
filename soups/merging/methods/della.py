"""DELLA: drop elements at random, small ones sooner; then TIES' election and mean.

DELLA-Merging (arXiv:2406.11617), section 3 (MagPrune): within each row an element is kept with probability
p_i = d − ε + 2ε · rank_i / (n − 1), rank 0 for the smallest magnitude, and divided by p_i.

When it fails: As DARE, below a density of about 0.1. Every row is sorted, which makes it the slowest of this family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk, Unit
from soups.merging.kernels import Choice, Limits
from soups.merging.method import PerModel, one_of
from soups.merging.noise import kept_each, masked_, to_draw_each
from soups.merging.ordering import by_rank
from soups.merging.stages import Elect, TaskVectors, mergekit_form
from soups.merging.transforms import Transform


@dataclass(frozen=True)
class MagnitudeDrop(Transform):
    """Keep an element with a probability that grows with its rank in its row.

    Attributes:
        density: the mean probability, one for all models or one for each.
        epsilon: half the width of the window of probabilities.
        rescale: divide each element by its probability.
        seed: of the masks.
    """

    revisits: ClassVar[bool] = False
    density: PerModel
    epsilon: PerModel = 0.15
    rescale: bool = True
    seed: int = 0

    @property
    def unit(self) -> Unit:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ranks are within rows."""
        return "row"

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Drop."""
        density = one_of(self.density, model)
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        limits = self._limits(delta, chunk, model)
        masked_(delta, kept_each(_narrow(limits), self.seed, chunk.key, model, chunk.start, limits.numel()))
        return delta.div_(limits.to(delta.device, delta.dtype).mul_(2.0**-16)) if self.rescale else delta

    def choice(self, seen: Any, chunk: Chunk, count: int, model: int) -> Choice | None:
        """Drop, where that is all."""
        if self.rescale or not 0 < one_of(self.density, model) < 1:
            return None
        limits = self._limits(chunk.delta(model), chunk, model)
        return Choice(mask=to_draw_each(_narrow(limits), self.seed, chunk.key, model, chunk.start))

    def _limits(self, delta: Tensor, chunk: Chunk, model: int) -> Tensor:
        """Return each element's probability of being kept, times 2¹⁶."""
        density, epsilon = one_of(self.density, model), one_of(self.epsilon, model)
        if not 0 < density - epsilon <= density + epsilon < 1:
            raise ConfigError(
                f"density={density} and epsilon={epsilon} give probabilities outside 0 … 1; epsilon must be smaller "
                f"than {min(density, 1 - density):.3g}."
            )
        width = max(1, chunk.width)
        share = (
            torch.linspace(0, 1, width, dtype=torch.float64) if width > 1 else torch.tensor([0.5], dtype=torch.float64)
        )
        limits = ((density - epsilon + 2 * epsilon * share) * 2**16).round_().clamp_(1, 2**16 - 1).to(torch.int32)
        return by_rank(delta.view(-1, width), limits).view(-1)


def _narrow(limits: Tensor) -> Limits:
    return limits.numpy().astype(np.uint16)


def della(
    *,
    density: PerModel = 0.5,
    epsilon: PerModel = 0.15,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> TaskVectors:
    """The paper's DELLA: MagPrune, election, mean over who agrees.

    Args:
        density: the mean share to keep.
        epsilon: half the window of probabilities.
        weight: one for all models or one for each.
        scale: λ; the authors' example uses 1.1.
        seed: of the masks.
    """
    return TaskVectors(MagnitudeDrop(density, epsilon, seed=seed), weight, Elect(), "mean", scale)


def della_mergekit(
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `della`: rescaling restores each tensor's L1 norm; weights vote.

    Args:
        density: the mean share to keep.
        epsilon: half the window of probabilities.
        weight: one for all models or one for each; they vote.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights of those that agree.
        rescale: restore each task vector's L1 norm.
        seed: of the masks.
    """
    drop = MagnitudeDrop(density, epsilon, rescale=False, seed=seed)
    return mergekit_form(drop, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=True)


def della_linear_mergekit(
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `della_linear`: no election.

    Args:
        density: the mean share to keep.
        epsilon: half the window of probabilities.
        weight: one for all models or one for each.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights.
        rescale: restore each task vector's L1 norm.
        seed: of the masks.
    """
    drop = MagnitudeDrop(density, epsilon, rescale=False, seed=seed)
    return mergekit_form(drop, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=False)
