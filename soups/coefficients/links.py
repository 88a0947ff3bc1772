"""Links: from the free parameters that an optimiser moves to the coefficients of a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from soups.errors import ConfigError, did_you_mean

LinkName = Literal["none", "clamp", "softmax", "sigmoid"]


class Link(NamedTuple):
    """A differentiable map of parameters, float64 (rows, vectors), to coefficients of the same shape, and its start."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[float, int], float]
    """From a coefficient, and the number of vectors, to the parameter that gives it."""


def _same(value: float, count: int) -> float:
    return value


def _logit(value: float, count: int) -> float:
    if not 0 < value < 1:
        raise ConfigError(f"start={value}: with link='sigmoid' a coefficient lies strictly between 0 and 1.")
    return math.log(value) - math.log1p(-value)


def _equal_shares(value: float, count: int) -> float:
    if not math.isclose(value, 1 / count, rel_tol=1e-9):
        raise ConfigError(
            f"start={value}: with link='softmax' the coefficients of {count} vectors sum to 1 and start equal; leave "
            f"`start` out."
        )
    return 0.0


LINKS: dict[str, Link] = {
    "none": Link(lambda free: free, _same),
    # In the forward pass, as AdaMerging does: outside [0, 1] the derivative is 0, and the parameter stays where it is.
    "clamp": Link(lambda free: torch.clamp(free, 0.0, 1.0), _same),
    "softmax": Link(lambda free: free.softmax(dim=1), _equal_shares),
    "sigmoid": Link(torch.sigmoid, _logit),
}


def find_link(name: str) -> Link:
    """Return a link by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in LINKS:
        raise ConfigError(f"There is no link {name!r}: {did_you_mean(name, LINKS)}")
    return LINKS[name]
