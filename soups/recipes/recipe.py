"""The interface of recipes: candidates and a held-out score as input, a soup with a record of its decisions as output.

A recipe is a function of the candidates, the score and its own options. It names further inputs as parameters: `gradient`,
`predict`, `labels`, `start` (the base model), `fisher`, `on_step`. They are plain callables or values, so no recipe depends on
pools, Hydra or Lightning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from soups.coefficients import Mixture, Points, search
from soups.errors import ConfigError, did_you_mean
from soups.evaluation.gradients import Slope as Slope
from soups.stores import DictStore, Store
from soups.weights import RunningSum, Weights

Ties = Literal["paper", "official"]
TIES = ("paper", "official")

Score = Callable[[Weights], float]
"""Held-out score of some weights; larger is better."""

Predict = Callable[[Weights], Tensor]
"""Logits, float32 (N, classes), of some weights on the held-out split."""

Fisher = Callable[[Weights], dict[str, Tensor]]
"""Diagonal Fisher information of some weights, by tensor; tensors without a gradient are left out."""


class Trial(NamedTuple):
    """The result of a trial soup: its score, whether it is kept, and the share of held-out samples that were evaluated.

    A race (`soups.recipes.racing`) can drop a trial soup early. Its score then assumes the best soup's results on the remaining
    samples.
    """

    score: float
    kept: bool
    evaluated: float = 1.0


@runtime_checkable
class Judge(Protocol):
    """Decides whether a trial soup reaches a score, from part of the samples if possible; for example `racing.Race`."""

    def decide(self, weights: Weights, to_reach: float, ties: Ties) -> Trial:
        """Return the decision on these weights; `to_reach` is the score of the last kept soup, -inf for the first trial."""
        ...


class Gradient(Protocol):
    """The loss of given weights on one batch of the held-out split, and its derivatives."""

    @property
    def batches(self) -> int:
        """The number of batches in the split."""
        ...

    def __call__(self, weights: Weights, batch: int, beta: float) -> Slope:
        """Return the mean cross-entropy of `beta` times the logits on batch number `batch`, with its derivatives."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One ingredient that a recipe may select.

    Attributes:
        name: the name in reports.
        score: the ingredient's own held-out score; larger is better.
        load: reads the weights.
        open: opens the weights as a store, to read one tensor at a time; `None`: use `load`.
    """

    name: str
    score: float
    load: Callable[[], Weights]
    open: Callable[[], Store] | None = None

    def store(self) -> Store:
        """Return the weights as a store; the caller closes it."""
        return self.open() if self.open else DictStore(self.load(), self.name)


@dataclass(frozen=True)
class Step:
    """One decision: the candidate, the soup's held-out score with it, the score to reach, and whether it was kept.

    For `action` "remove", the score is the soup's score without the candidate, and `kept` is true if it was removed.
    `evaluated` is the share of held-out samples that were evaluated; see `Trial` for the score of a share below 1.
    """

    name: str
    own_score: float
    soup_score: float
    to_reach: float
    kept: bool
    action: Literal["add", "remove"] = "add"
    evaluated: float = 1.0


@dataclass(frozen=True)
class Point:
    """One point of a searched path: its position, its held-out score, and a function that makes its weights."""

    position: float
    score: float
    load: Callable[[], Weights]


@dataclass(frozen=True)
class Soup:
    """Averaged weights, with the recipe's decisions.

    Attributes:
        weights: the average.
        members: the names of the soup's ingredients, in the order in which they were added.
        score: the soup's held-out score.
        steps: the decisions of a search, in order.
        coefficients: the share of each ingredient (and of the base model as "start", if it has one); they sum to 1.
        by_tensor: shares by tensor and ingredient, if they differ between tensors.
        path: the points of a searched path, in the order of their positions.
        path_label: the meaning of a position on the path.
        details: further results by name.
        note: a short description of the soup, for the table.
    """

    weights: dict[str, Tensor]
    members: list[str]
    score: float
    steps: list[Step] = field(default_factory=list[Step])
    coefficients: dict[str, float] = field(default_factory=dict[str, float])
    by_tensor: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    path: list[Point] = field(default_factory=list[Point])
    path_label: str = ""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    note: str = ""


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates by their own score, best first; equal candidates keep their order.

    Raises:
        ConfigError: there are none.
    """
    if not candidates:
        raise ConfigError("A soup needs at least one ingredient; the pool has none.")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"Two ingredients are called {twice!r}; give each a name of its own.")
    return sorted(candidates, key=lambda candidate: -candidate.score)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Check that an option has one of the allowed values.

    Raises:
        ConfigError: it has not; the message lists the allowed values.
    """
    if value not in allowed:
        what = {"ties": "tie rule"}.get(name, name)
        raise ConfigError(f"There is no {what} {value!r}: {did_you_mean(str(value), allowed)}")


def reaches(value: float, best: float, ties: str) -> bool:
    """Tell whether a score is good enough: at least as good for "paper" (≥), better for "official" (>)."""
    return value > best or (ties == "paper" and value == best)


def decide(score: Score | Judge, weights: Weights, to_reach: float, ties: Ties) -> Trial:
    """Decide whether to keep weights: by the judge, or by comparing a plain score."""
    if isinstance(score, Judge):
        return score.decide(weights, to_reach, ties)
    value = score(weights)
    return Trial(value, reaches(value, to_reach, ties))


def mixed(parts: Sequence[tuple[str, Callable[[], Weights], float]]) -> dict[str, Tensor]:
    """Return the average of (name, load, share), with one model in memory at a time beside the sum.

    The shares are divided by their sum.
    """
    total = RunningSum()
    for name, load, share in parts:
        total.add(load(), where=name, factor=share)
    return total.mean()


def line(first: Weights, second: Weights, share: float, *, where: str = "the other end") -> dict[str, Tensor]:
    """Return (1 - share) · first + share · second, the mixture of two models with one coefficient each."""
    return Mixture(None, {"the first end": first, where: second}).at((1 - share, share))


def grid(points: int, alpha: float | None = None) -> list[float]:
    """Return `points` evenly spaced positions from 0 to 1, rounded to 12 decimals, and `alpha`.

    >>> grid(6), grid(3, 0.3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.3, 0.5, 1.0])

    Raises:
        ConfigError: fewer than 2, or an alpha outside [0, 1].
    """
    if points < 2:
        raise ConfigError(f"A path needs at least 2 points, not {points}.")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} must be between 0 and 1, the ends of the path.")
    even = {round(number / (points - 1), 12) for number in range(points)}
    return sorted(even if alpha is None else even | {float(alpha)})


def walk(
    make: Callable[[float], dict[str, Tensor]],
    score: Score,
    positions: Sequence[float],
    prefer: Callable[[float], float],
) -> tuple[Point, list[Point]]:
    """Return the best point of a path, and all points.

    Args:
        make: makes the weights at a position.
        score: the held-out score of weights; larger is better.
        positions: the positions of the points.
        prefer: of equally good points, the point with the larger value is the best.
    """
    points = Points([[position] for position in positions])
    found = search(lambda point: make(point[0]), score, points, prefer=lambda point: prefer(point[0]))
    path = [Point(at, trial.score, lambda at=at: make(at)) for trial in found.trials for at in trial.point]
    return path[found.trials.index(found.best)], path


# Parameters that are no options of a recipe: what it is given to work with.
GIVEN = ("candidates", "score", "on_step", "gradient", "predict", "labels", "start", "fisher")


def options_of(recipe: Callable[..., Soup]) -> dict[str, Any]:
    """Return the options of a recipe with their defaults.

    >>> def half(candidates, score, start, share=0.5): ...
    >>> options_of(half), needs_of(half)
    ({'share': 0.5}, {'start'})
    """
    parameters = inspect.signature(recipe).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in GIVEN}


def needs_of(recipe: Callable[..., Soup]) -> set[str]:
    """Return the names of a recipe's inputs other than the candidates, the score and its options."""
    return {name for name in inspect.signature(recipe).parameters if name in GIVEN[2:]}


def is_required(recipe: Callable[..., Soup], name: str) -> bool:
    """Tell whether a recipe's parameter has no default."""
    return inspect.signature(recipe).parameters[name].default is inspect.Parameter.empty
