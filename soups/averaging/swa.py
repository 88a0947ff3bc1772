"""Stochastic weight averaging: the equal mean of the points of a trajectory.

Averaging Weights Leads to Wider Optima and Better Generalization (arXiv:1803.05407), equation 2:
a ← (a n + θ)/(n + 1). The learning-rate schedules of the paper are in `schedulers`, to be used or not.
"""

from __future__ import annotations

from soups.averaging.lerp import Lerp, lerp_
from soups.weights import Weights


class SWA(Lerp):
    """Equal mean of all points.

    >>> import torch
    >>> swa = SWA()
    >>> for value in (1.0, 2.0, 6.0):
    ...     swa.update({"w": torch.tensor([value])})
    >>> swa.value()["w"]
    tensor([3.])
    """

    kind = "SWA"

    def _next_weight(self) -> float:
        return 1 / (self.count + 1)


def swa_update_(average: Weights, weights: Weights, count: int) -> None:
    """Update an equal average in place: the plain function behind `SWA`.

    Args:
        average: name to tensor; overwritten.
        weights: the same names and shapes; the new point.
        count: points taken in before this one.
    """
    lerp_(average, weights, 1 / (count + 1))
