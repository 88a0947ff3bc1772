"""DELLA: drop elements at random, small ones sooner; then TIES' election and mean.

DELLA-Merging (arXiv:2406.11617), section 3 (MagPrune): within each row an element is kept with probability
p_i = d − ε + 2ε · rank_i / (n − 1), rank 0 for the smallest magnitude, and divided by p_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.noise import uniform
from soups.merging.operands import Chunk, Unit
from soups.merging.stages import Elect, KeepNorm, TaskVectors, Transform

Several = float | tuple[float, ...]


def row_ranks(rows: Tensor) -> Tensor:
    """Return each element's rank by magnitude within its row, 0 for the smallest; of equal ones the earlier ranks lower.

    Magnitudes and places are packed into one integer each: sorting those is several times faster than an argsort.

    >>> row_ranks(torch.tensor([[3.0, -1.0, 2.0, 1.0]])).tolist()
    [[3, 0, 2, 1]]
    """
    width = rows.shape[1]
    if rows.dtype == torch.float32:
        packed = rows.abs().view(torch.int32).to("cpu", torch.int64) << 32
        packed |= torch.arange(width, dtype=torch.int64)
        packed.numpy().sort(axis=1)
        order = torch.from_numpy(packed.numpy().view(np.uint32)[:, ::2].astype(np.int64))
    else:
        order = rows.abs().cpu().argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(width).expand_as(order)).to(rows.device)


@dataclass(frozen=True)
class MagnitudeDrop(Transform):
    """Keep an element with a probability that grows with its rank in its row.

    Attributes:
        density: the mean probability, one for all models or one for each.
        epsilon: half the width of the window of probabilities.
        rescale: divide each element by its probability.
        seed: of the masks.
    """

    density: Several
    epsilon: Several = 0.15
    rescale: bool = True
    seed: int = 0

    @property
    def unit(self) -> Unit:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ranks are within rows."""
        return "row"

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Drop."""
        density = self.density if isinstance(self.density, int | float) else self.density[model]
        epsilon = self.epsilon if isinstance(self.epsilon, int | float) else self.epsilon[model]
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        if not 0 < density - epsilon <= density + epsilon < 1:
            raise ConfigError(
                f"density={density} and epsilon={epsilon} give probabilities outside 0 … 1; epsilon must be smaller "
                f"than {min(density, 1 - density):.3g}."
            )
        width = max(1, chunk.width)
        ranks = row_ranks(delta.view(-1, width)).to(delta.dtype)
        share = ranks.div_(width - 1) if width > 1 else ranks.add_(0.5)
        probability = share.mul_(2 * epsilon).add_(density - epsilon).view(-1)
        draw = uniform(self.seed, chunk.key, model, chunk.start, delta.numel(), like=delta)
        delta.mul_((draw < probability).to(delta.dtype))
        return delta.div_(probability) if self.rescale else delta


def della(
    *,
    density: Several = 0.5,
    epsilon: Several = 0.15,
    weight: Several = 1.0,
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


def _mergekit(density: Several, epsilon: Several, rescale: bool, seed: int) -> Transform:
    drop = MagnitudeDrop(density, epsilon, rescale=False, seed=seed)
    return KeepNorm(drop) if rescale else drop


def della_mergekit(
    *,
    density: Several = 1.0,
    epsilon: Several = 0.15,
    weight: Several = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `della`: rescaling restores each tensor's L1 norm; weights vote."""
    consensus = Elect(weighted=True, zero="plus")
    transform = _mergekit(density, epsilon, rescale, seed)
    return TaskVectors(transform, weight, consensus, "mean" if normalize else "sum", scale)


def della_linear_mergekit(
    *,
    density: Several = 1.0,
    epsilon: Several = 0.15,
    weight: Several = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
) -> TaskVectors:
    """mergekit's `della_linear`: no election."""
    transform = _mergekit(density, epsilon, rescale, seed)
    return TaskVectors(transform, weight, None, "mean" if normalize else "sum", scale)
