"""Choosing a merge method's parameters by a held-out score."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from soups.coefficients.optimisers import Grid, Optimiser
from soups.coefficients.search import Found, Score, search
from soups.merging import make_method, merge
from soups.stores import Store

Checkpoint = str | os.PathLike[str] | Mapping[str, Tensor] | Store


def search_parameters(
    name: str,
    models: Sequence[Checkpoint],
    score: Score,
    space: Mapping[str, Any] | Optimiser[dict[str, Any]],
    *,
    base: Checkpoint | None = None,
    **options: Any,
) -> Found[dict[str, Any]]:
    """Merge with each of the parameters that an optimiser proposes, and keep the best by a held-out score.

    Args:
        name: a merge method's.
        models: whatever `open_store` takes.
        score: the held-out score of merged weights, larger is better; never the test score. NaN counts as the worst.
        space: parameters with lists of candidates, for a grid; or an optimiser.
        base: the base model.
        options: those of `soups.merging.merge`.

    Returns:
        The trials, the best of them (the first of equal ones), and its weights.

    Raises:
        ConfigError: an unknown method or parameter, or a search without trials.

    >>> import torch
    >>> base, expert = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    >>> found = search_parameters(
    ...     "task_arithmetic", [expert], lambda w: -abs(float(w["w"]) - 0.5), {"scale": [0.1, 0.4, 0.9]}, base=base)
    >>> found.best.point, len(found.trials)
    ({'scale': 0.4}, 3)
    """
    optimiser: Optimiser[dict[str, Any]] = Grid(space) if isinstance(space, Mapping) else space

    def make(parameters: dict[str, Any]) -> dict[str, Tensor]:
        return cast("dict[str, Tensor]", merge(make_method(name, **parameters), models, base=base, **options))

    return search(make, score, optimiser)
