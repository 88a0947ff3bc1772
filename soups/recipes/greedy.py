"""Greedy soup: add ingredients in the order of their held-out score, keep each one that does not lower the soup's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from soups.recipes.recipe import TIES, Candidate, Judge, Score, Soup, Step, Ties, check_choice, decide, ranked
from soups.weights import RunningSum


def greedy(
    candidates: Sequence[Candidate],
    score: Score | Judge,
    ties: Ties = "paper",
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the greedy soup of Model soups (arXiv:2203.05482, Recipe 1).

    Candidates are tried in falling order of their own score; of equal ones the first given comes first, or the last given with
    `ties="official"`, as in the authors' code. A running sum makes each
    trial one addition: every ingredient is read once, memory is one sum and one model, and N candidates need N
    evaluations, the first of them to confirm the best single model's score.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights, larger is better; or a judge, which may drop hopeless ones early.
        ties: "paper" keeps an ingredient when the score is at least as good (≥, Recipe 1), "official" only when it is
            better (>, the authors' code).
        on_step: called after each decision, for progress.

    Raises:
        ConfigError: no candidates, or an unknown tie rule.
        soups.errors.WeightsError: ingredients that do not fit each other.

    >>> import torch
    >>> points = {"a": 1.0, "b": 3.0, "c": 10.0}
    >>> pool = [Candidate(n, -abs(x - 2), lambda x=x: {"w": torch.tensor([x])}) for n, x in points.items()]
    >>> soup = greedy(pool, lambda weights: -abs(weights["w"].item() - 2))
    >>> soup.members, soup.weights["w"].item()
    (['a', 'b'], 2.0)
    """
    check_choice("ties", ties, TIES)
    order = ranked(candidates if ties == "paper" else candidates[::-1])
    total = RunningSum()
    members: list[str] = []
    steps: list[Step] = []
    best = float("-inf")
    weights: dict[str, Tensor] = {}
    for candidate in order:
        loaded = candidate.load()
        trial = total.mean_with(loaded, where=candidate.name)
        value, kept, evaluated = decide(score, trial, best, ties)
        kept = kept or not members
        step = Step(candidate.name, candidate.score, value, best, kept, evaluated=evaluated)
        steps.append(step)
        if kept:
            total.add(loaded, where=candidate.name)
            members.append(candidate.name)
            best, weights = value, trial
        if on_step:
            on_step(step)
    return Soup(weights, members, best, steps, {name: 1 / len(members) for name in members})
