"""Any recipe, made again on part of the held-out samples: what its choices do to its score.

A recipe that averages is a way to choose coefficients. Here it is run for real, on weights that are nothing but those
coefficients (ingredient k is the k-th unit vector), with a score that looks up or computes per-sample scores of that
average. `soups.evaluation.statistics.selection_effect` then asks for the choice on halves or resamples of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation.statistics import Select
from soups.recipes.recipe import Candidate, Score, Soup
from soups.weights import Weights

Evaluate = Callable[[Mapping[str, float]], Tensor]


def replay(
    recipe: Callable[[Sequence[Candidate], Score], Soup],
    names: Sequence[str],
    own: Tensor,
    evaluate: Evaluate,
) -> Select:
    """Return the recipe as a choice by sample indices, for `selection_effect`.

    Args:
        recipe: `greedy` or any other that averages what it is given.
        names: of the ingredients.
        own: per-sample scores of each alone, (ingredients, N); larger is better.
        evaluate: per-sample scores (N,) of an average, given its coefficients by name (above zero, sum 1). Called once
            for each average, however often the recipe asks. Evaluating for real makes the estimate exact, at one
            evaluation for each new soup; `only_tried` costs nothing and says what it leaves out.

    Raises:
        ConfigError: names and scores do not fit.
    """
    if len(names) != len(own) or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} names ({len(set(names))} different) do not fit the scores of {len(own)} ingredients."
        )
    units = torch.eye(len(names), dtype=torch.float64)
    own = own.double()
    known: dict[tuple[float, ...], Tensor] = {tuple(unit.tolist()): row for unit, row in zip(units, own, strict=True)}

    def samples(weights: Weights) -> Tensor:
        key = tuple(weights["coefficients"].tolist())
        if key not in known:
            known[key] = evaluate({name: value for name, value in zip(names, key, strict=True) if value}).double()
        return known[key]

    def select(indices: Tensor) -> Tensor:
        candidates = [
            Candidate(name, float(row[indices].mean()), lambda unit=unit: {"coefficients": unit})
            for name, row, unit in zip(names, own, units, strict=True)
        ]
        return samples(recipe(candidates, lambda weights: float(samples(weights)[indices].mean())).weights)

    return select


def only_tried(tried: Mapping[frozenset[str], Tensor]) -> Evaluate:
    """Return an evaluation that knows the soups a finished search has tried, and rejects every other.

    What it leaves out: on other samples the search would also have built soups that the real one never did. With those
    barred, it chooses from fewer, and the selection effect comes out too small.

    Args:
        tried: per-sample scores (N,) of uniform averages, by the names in them.
    """
    count = len(next(iter(tried.values())))

    def evaluate(coefficients: Mapping[str, float]) -> Tensor:
        return tried.get(frozenset(coefficients), torch.full((count,), -torch.inf, dtype=torch.float64))

    return evaluate
