"""Choosing a method's coefficients by a held-out score.

Every parameter may be a list of candidates. A search asks and is told: `Grid` tries all; another optimiser (CMA-ES, random,
gradient-free of any kind) needs the same two methods and nothing else here changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from soups.errors import ConfigError
from soups.merging.api import Place, merge
from soups.merging.methods import make_method


class Search(Protocol):
    """Proposes parameters and learns their scores."""

    def ask(self) -> dict[str, Any] | None:
        """Return the next parameters to try, or `None` when the search is over."""
        ...

    def tell(self, parameters: Mapping[str, Any], score: float) -> None:
        """Take the score of parameters that were asked for; higher is better."""
        ...


class Grid:
    """Every combination of the candidates, in order.

    Args:
        space: parameters; a list holds candidates, anything else is fixed (a tuple is one value a model).

    >>> grid = Grid({"density": [0.1, 0.2], "scale": 1.0})
    >>> grid.ask(), grid.ask(), grid.ask()
    ({'density': 0.1, 'scale': 1.0}, {'density': 0.2, 'scale': 1.0}, None)

    Raises:
        ConfigError: a list without candidates.
    """

    def __init__(self, space: Mapping[str, Any]) -> None:
        for name, candidates in space.items():
            if isinstance(candidates, list) and not candidates:
                raise ConfigError(f"There are no candidates for {name!r}; give at least one.")
        lists = [cast("list[Any]", value) if isinstance(value, list) else [value] for value in space.values()]
        self._combinations = (dict(zip(space, values, strict=True)) for values in itertools.product(*lists))

    def ask(self) -> dict[str, Any] | None:
        """Return the next combination."""
        return next(self._combinations, None)

    def tell(self, parameters: Mapping[str, Any], score: float) -> None:
        """Do nothing: a grid does not learn."""


class Trial(NamedTuple):
    """Parameters that were tried, and their score on held-out data."""

    parameters: dict[str, Any]
    score: float


class Found(NamedTuple):
    """The outcome of a search.

    Attributes:
        best: the trial of the highest score; the first of equal ones.
        weights: its merged weights.
        trials: all trials, in order.
    """

    best: Trial
    weights: dict[str, Tensor]
    trials: list[Trial]


def search_coefficients(
    name: str,
    models: Sequence[Place],
    score: Callable[[dict[str, Tensor]], float],
    space: Mapping[str, Any] | Search,
    *,
    base: Place | None = None,
    **options: Any,
) -> Found:
    """Merge with each of the parameters that a search proposes, and keep the best by a held-out score.

    Args:
        name: a merge method's.
        models: whatever `open_store` takes.
        score: the held-out score of merged weights, higher is better; never the test score. NaN counts as the worst.
        space: parameters with lists of candidates, for a grid; or a search.
        base: the base model.
        options: those of `soups.merging.merge`.

    Raises:
        ConfigError: an unknown method or parameter, or a search without trials.

    >>> import torch
    >>> base, expert = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    >>> found = search_coefficients(
    ...     "task_arithmetic", [expert], lambda w: -abs(float(w["w"]) - 0.5), {"scale": [0.1, 0.4, 0.9]}, base=base)
    >>> found.best.parameters, len(found.trials)
    ({'scale': 0.4}, 3)
    """
    proposals: Search = Grid(space) if isinstance(space, Mapping) else space
    best: Trial | None = None
    kept: dict[str, Tensor] = {}
    trials: list[Trial] = []
    while (parameters := proposals.ask()) is not None:
        weights = cast("dict[str, Tensor]", merge(make_method(name, **parameters), models, base=base, **options))
        value = float(score(weights))
        trials.append(Trial(parameters, value))
        proposals.tell(parameters, value)
        if best is None or (not math.isnan(value) and (math.isnan(best.score) or value > best.score)):
            best, kept = trials[-1], weights
    if best is None:
        raise ConfigError("The search proposed nothing to try.")
    return Found(best, kept, trials)
