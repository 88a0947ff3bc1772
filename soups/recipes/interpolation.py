"""Interpolation of two fine-tunes: the line between them, and the best point on it."""

from __future__ import annotations

from collections.abc import Sequence

from soups.errors import ConfigError, did_you_mean
from soups.recipes.recipe import Candidate, Score, Soup, grid, line, ranked, walk


def interpolation(
    candidates: Sequence[Candidate],
    score: Score,
    between: Sequence[str] | None = None,
    points: int = 6,
) -> Soup:
    """Return the best point of the line λ · first + (1 - λ) · second between two fine-tunes.

    UnIVAL (arXiv:2307.16184) does so with models fine-tuned on different tasks from one start; then `score` is what the
    tasks together ask for. The soup's `path` has every point, a barrier included (arXiv:1412.6544): a path that dips
    between its ends says that the two lie in different basins.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        between: the two ends by name or beginning of a name; None for the two best.
        points: on the grid, both ends included; 6 is UnIVAL's step of 0.2.

    Raises:
        ConfigError: fewer than two candidates, names that fit none or several, fewer than two points.
        soups.errors.WeightsError: the two do not fit each other.

    >>> import torch
    >>> pool = [Candidate(n, 0.0, lambda x=x: {"w": torch.tensor([x])}) for n, x in [("a", 0.0), ("b", 5.0)]]
    >>> interpolation(pool, lambda weights: -abs(weights["w"].item() - 1)).coefficients
    {'a': 0.8, 'b': 0.2}
    """
    order = ranked(candidates)
    if len(order) < 2:
        raise ConfigError("Interpolation needs two ingredients; the pool has one.")
    names = [candidate.name for candidate in order[:2]] if between is None else list(between)
    if len(names) != 2:
        raise ConfigError(f"between={names} must name two ingredients.")
    first, second = (_named(name, order) for name in names)
    if first.name == second.name:
        raise ConfigError(f"between={names} names the ingredient {first.name} twice; give two different ones.")
    one, two = first.load(), second.load()
    best, path = walk(
        lambda share: line(two, one, share, where=first.name), score, grid(points), prefer=lambda at: -abs(at - 0.5)
    )
    shares = {first.name: best.position, second.name: round(1 - best.position, 12)}
    return Soup(
        dict(best.load()),
        [name for name, share in shares.items() if share],
        best.score,
        coefficients=shares,
        path=path,
        path_label=f"λ: share of {first.name}, the rest is {second.name}",
        details={"share": best.position},
    )


def _named(name: str, candidates: Sequence[Candidate]) -> Candidate:
    found = [candidate for candidate in candidates if candidate.name.startswith(str(name))]
    if len(found) != 1:
        known = did_you_mean(str(name), [candidate.name for candidate in candidates])
        raise ConfigError(f"between: {name!r} fits {len(found)} ingredients: {known}")
    return found[0]
