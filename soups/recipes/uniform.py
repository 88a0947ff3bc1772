"""Uniform soup: the average of all ingredients, with nothing chosen."""

from __future__ import annotations

from collections.abc import Sequence

from soups.recipes.recipe import Candidate, Score, Soup, mixed, ranked


def uniform(candidates: Sequence[Candidate], score: Score) -> Soup:
    """Return the uniform soup (arXiv:2203.05482, section 2): the mean of all ingredients' weights.

    Ingredients are added in the order of their names, so that the order they are given in cannot change a bit. Each is
    read once; the soup is scored once, and nothing depends on that score.

    Raises:
        ConfigError: no candidates.
        soups.errors.WeightsError: ingredients that do not fit each other.

    >>> import torch
    >>> pool = [Candidate(n, 0.0, lambda x=x: {"w": torch.tensor([x])}) for n, x in [("a", 1.0), ("b", 3.0)]]
    >>> uniform(pool, lambda weights: 0.0).weights["w"].item()
    2.0
    """
    ordered = sorted(ranked(candidates), key=lambda candidate: candidate.name)
    weights = mixed([(candidate.name, candidate.load, 1.0) for candidate in ordered])
    names = [candidate.name for candidate in ordered]
    return Soup(weights, names, score(weights), coefficients={name: 1 / len(names) for name in names})
