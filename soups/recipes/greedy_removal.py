"""Greedy soup with removal: after the greedy pass, take out members as long as that raises the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from soups.recipes.greedy import greedy
from soups.recipes.recipe import Candidate, Score, Soup, Step, Ties, mixed
from soups.weights import RunningSum


def greedy_removal(
    candidates: Sequence[Candidate],
    score: Score,
    ties: Ties = "paper",
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the greedy soup after backward elimination.

    The greedy pass (`soups.recipes.greedy`) decides in one order and never looks back: an early member that a later one
    makes superfluous stays. Here every member is then tried without; the removal that helps most is made, and so on
    until none raises the held-out score. With M members left by the greedy pass this costs at most M (M + 1) / 2 further
    evaluations and reads. More is chosen on the same split, so the held-out score is the more optimistic.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        ties: of the greedy pass; see `soups.recipes.greedy`. A removal must always raise the score.
        on_step: called after each decision, for progress.

    Raises:
        ConfigError: no candidates, or an unknown tie rule.
        soups.errors.WeightsError: ingredients that do not fit each other.
    """
    soup = greedy(candidates, score, ties, on_step)
    by_name = {candidate.name: candidate for candidate in candidates}
    steps = list(soup.steps)
    members, best = list(soup.members), soup.score
    total = RunningSum()
    for name in members:
        total.add(by_name[name].load(), where=name)
    while len(members) > 1:
        trials = {name: score(total.mean_with(by_name[name].load(), where=name, factor=-1.0)) for name in members}
        name = max(trials, key=lambda name: trials[name])
        step = Step(name, by_name[name].score, trials[name], best, trials[name] > best, "remove")
        steps.append(step)
        if on_step:
            on_step(step)
        if not step.kept:
            break
        total.add(by_name[name].load(), where=name, factor=-1.0)
        members.remove(name)
        best = trials[name]
    if members == soup.members:
        return Soup(soup.weights, members, best, steps, soup.coefficients)
    # Made anew from its members: a sum that one was taken out of may differ in the last bit.
    weights = mixed([(name, by_name[name].load, 1.0) for name in members])
    return Soup(weights, members, best, steps, {name: 1 / len(members) for name in members})
