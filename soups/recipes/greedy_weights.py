"""Greedy soup with weights: in each round add the ingredient that helps most, also one that is in it already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from soups.errors import ConfigError
from soups.recipes.recipe import Candidate, Score, Soup, Step, ranked
from soups.weights import RunningSum


def greedy_weights(
    candidates: Sequence[Candidate],
    score: Score,
    rounds: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the soup of forward selection with replacement: the counts are the weights.

    This is the ensemble selection of Caruana et al. (ICML 2004) with weights averaged in place of predictions. It starts
    at the best single model; each round scores the soup with one more of every candidate and adds the best, until no
    addition raises the held-out score. N candidates need up to N evaluations and reads a round.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        rounds: at most so many additions after the first; None for as many as there are candidates.
        on_step: called after each round, for progress.

    Raises:
        ConfigError: no candidates, or a negative number of rounds.
        soups.errors.WeightsError: ingredients that do not fit each other.

    >>> import torch
    >>> pool = [Candidate(n, -abs(x - 1), lambda x=x: {"w": torch.tensor([x])}) for n, x in [("a", 0.0), ("b", 3.0)]]
    >>> greedy_weights(pool, lambda weights: -abs(weights["w"].item() - 1)).coefficients
    {'a': 0.6666666666666666, 'b': 0.3333333333333333}
    """
    order = ranked(candidates)
    limit = len(order) if rounds is None else rounds
    if limit < 0:
        raise ConfigError(f"rounds={rounds} must be a whole number of at least 0.")
    total = RunningSum()
    first = order[0]
    total.add(first.load(), where=first.name)
    weights = total.mean()
    best = score(weights)
    counts = Counter([first.name])
    steps = [Step(first.name, first.score, best, float("-inf"), True)]
    if on_step:
        on_step(steps[0])
    for _ in range(limit):
        trials = [score(total.mean_with(candidate.load(), where=candidate.name)) for candidate in order]
        value = max(trials)
        chosen = order[trials.index(value)]
        step = Step(chosen.name, chosen.score, value, best, value > best)
        steps.append(step)
        if on_step:
            on_step(step)
        if not step.kept:
            break
        total.add(chosen.load(), where=chosen.name)
        counts[chosen.name] += 1
        best, weights = value, total.mean()
    size = counts.total()
    return Soup(weights, list(counts), best, steps, {name: count / size for name, count in counts.items()})
