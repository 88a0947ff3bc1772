"""Top-k soup: the average of the k best ingredients, k given or chosen on the held-out split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from soups.errors import ConfigError
from soups.recipes.recipe import Candidate, Score, Soup, Step, ranked
from soups.weights import RunningSum


def top_k(
    candidates: Sequence[Candidate],
    score: Score,
    k: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the average of the k candidates with the best scores of their own.

    Without `k`, every k is scored and the best kept; of equally good ones the largest, since a longer average varies
    less. One running sum serves all, so N candidates need N evaluations (one, when k is given) and are read once.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        k: how many; None to choose.
        on_step: called after each k that is scored, for progress. A step is kept when it is the best so far.

    Raises:
        ConfigError: no candidates, or a k that is not between 1 and their number.
        soups.errors.WeightsError: ingredients that do not fit each other.

    >>> import torch
    >>> points = {"a": 1.0, "b": 4.0, "c": 6.0}
    >>> pool = [Candidate(n, -abs(x - 3), lambda x=x: {"w": torch.tensor([x])}) for n, x in points.items()]
    >>> top_k(pool, lambda weights: -abs(weights["w"].item() - 3)).members, top_k(pool, lambda weights: 0.0, 1).members
    (['b', 'a'], ['b'])
    """
    order = ranked(candidates)
    if k is not None and not 1 <= k <= len(order):
        raise ConfigError(f"k={k} must be between 1 and the number of ingredients, {len(order)}.")
    total = RunningSum()
    best, chosen = float("-inf"), 0
    weights: dict[str, Tensor] = {}
    steps: list[Step] = []
    for number, candidate in enumerate(order[:k], start=1):
        total.add(candidate.load(), where=candidate.name)
        if k is not None and number < k:
            continue
        trial = total.mean()
        value = score(trial)
        step = Step(candidate.name, candidate.score, value, best, value >= best)
        steps.append(step)
        if step.kept:
            best, chosen, weights = value, number, trial
        if on_step:
            on_step(step)
    members = [candidate.name for candidate in order[:chosen]]
    shares = dict.fromkeys(members, 1 / chosen)
    return Soup(weights, members, best, steps if k is None else [], shares, details={"k": chosen})
