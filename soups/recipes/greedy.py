"""Greedy soup: add ingredients in the order of their held-out score, keep each one that does not lower the soup's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from soups.errors import ConfigError, did_you_mean
from soups.weights import RunningSum, Weights

Ties = Literal["paper", "official"]
Score = Callable[[Weights], float]


@dataclass(frozen=True)
class Candidate:
    """One ingredient to choose from.

    Attributes:
        name: shown to people.
        score: its own held-out score; larger is better.
        load: reads its weights; called once.
    """

    name: str
    score: float
    load: Callable[[], Weights]


class Trial(NamedTuple):
    """What became of a trial soup: its score, whether it is kept, and the share of the samples that this took.

    Of one that was dropped early (`soups.recipes.racing`), the score is what it would be if it did like the one to beat
    on the samples that were not looked at.
    """

    score: float
    kept: bool
    evaluated: float = 1.0


@runtime_checkable
class Judge(Protocol):
    """Decides whether a trial soup reaches a score, if possible from part of the samples; `racing.Race` is one."""

    def decide(self, weights: Weights, to_reach: float, keep_equal: bool) -> Trial:
        """Return the decision on some weights; `to_reach` is the last kept one's score, -inf at the start."""
        ...


@dataclass(frozen=True)
class Step:
    """One decision: the candidate, the soup's held-out score with it, the score to reach, and whether it stayed.

    `evaluated` is the share of the held-out samples that the decision took; `Trial` says what `soup_score` is below 1.
    """

    name: str
    own_score: float
    soup_score: float
    to_reach: float
    kept: bool
    evaluated: float = 1.0


@dataclass(frozen=True)
class Soup:
    """Averaged weights and how they came about.

    Attributes:
        weights: the average.
        members: names of the ingredients in it, in the order they were added.
        score: its held-out score.
        steps: the decisions, one a candidate (greedy only).
    """

    weights: dict[str, Tensor]
    members: list[str]
    score: float
    steps: list[Step] = field(default_factory=list[Step])


def greedy(
    candidates: Sequence[Candidate],
    score: Score | Judge,
    ties: Ties = "paper",
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the greedy soup of Model soups (arXiv:2203.05482, Recipe 1).

    Candidates are tried in falling order of their own score (equal ones in the order given). A running sum makes each
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
    if not candidates:
        raise ConfigError("A soup needs at least one ingredient; the pool has none.")
    if ties not in ("paper", "official"):
        raise ConfigError(f"There is no tie rule {ties!r}: {did_you_mean(ties, ['paper', 'official'])}")
    decide = score.decide if isinstance(score, Judge) else _in_full(score)
    total = RunningSum()
    members: list[str] = []
    steps: list[Step] = []
    best = float("-inf")
    weights: dict[str, Tensor] = {}
    for candidate in sorted(candidates, key=lambda candidate: -candidate.score):
        loaded = candidate.load()
        trial = total.mean_with(loaded, where=candidate.name)
        value, kept, evaluated = decide(trial, best, ties == "paper")
        kept = kept or not members
        step = Step(candidate.name, candidate.score, value, best, kept, evaluated)
        steps.append(step)
        if kept:
            total.add(loaded, where=candidate.name)
            members.append(candidate.name)
            best, weights = value, trial
        if on_step:
            on_step(step)
    return Soup(weights, members, best, steps)


def _in_full(score: Score) -> Callable[[Weights, float, bool], Trial]:
    def decide(weights: Weights, to_reach: float, keep_equal: bool) -> Trial:
        value = score(weights)
        return Trial(value, value > to_reach or (keep_equal and value == to_reach))

    return decide
