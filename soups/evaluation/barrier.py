"""The loss on straight lines between models, and the barrier that tells whether they lie in one basin.

BatchNorm: running statistics are floating tensors and lie on the line with the weights. Where fine-tuning keeps them
frozen they are equal in all models, and that is exact. Models that were trained with batch statistics need
`soups.averaging.batchnorm.reestimate` inside `evaluate` for every point; without it, much of the barrier is statistics
that fit neither end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from soups.errors import ConfigError, did_you_mean
from soups.weights import RunningSum, Weights

Load = Callable[[], Weights]
Numbers = Mapping[str, float]
Evaluate = Callable[[Sequence[Weights]], Sequence[Numbers]]
"""Numbers by name ("loss", "error": smaller is better) of one or several weights at once."""

Baseline = Literal["line", "mean"]


def one_by_one(numbers: Callable[[Weights], Numbers]) -> Evaluate:
    """Return an evaluation of several weights from one that takes them singly."""
    return lambda several: [numbers(weights) for weights in several]


def point(loads: Sequence[Load], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return the sum of coefficient times model, for coefficients that sum to 1: one model in memory beside the sum.

    Sums are as in `soups.weights.RunningSum`: in float64 for float32, integer tensors from the first model.

    Raises:
        ConfigError: the coefficients do not sum to 1.
    """
    if len(loads) != len(coefficients) or not math.isclose(math.fsum(coefficients), 1.0, abs_tol=1e-9):
        raise ConfigError(f"Coefficients {list(coefficients)} of {len(loads)} models must be as many and sum to 1.")
    total = RunningSum()
    for number, (load, factor) in enumerate(zip(loads, coefficients, strict=True)):
        total.add(load(), where=f"model number {number}", factor=factor)
    return total.mean()


class Barrier(NamedTuple):
    """How far a path rises above the straight line between its ends, and at which position."""

    height: float
    position: float


@dataclass(frozen=True)
class Path:
    """Numbers at points of a path through models: position k is model number k, between two lies their line.

    Attributes:
        positions: rising, with every model among them.
        values: by name, one a position.
    """

    positions: list[float]
    values: dict[str, list[float]]

    def barrier(self, name: str, baseline: Baseline = "line") -> Barrier:
        """Return the barrier of one of the numbers, its highest over the stretches between neighbouring models."""
        found = self.values[name]
        knots = [number for number, position in enumerate(self.positions) if position == round(position)]
        parts = [
            barrier(self.positions[begin : end + 1], found[begin : end + 1], baseline) for begin, end in pairwise(knots)
        ]
        return max(parts, key=lambda part: part.height)


def barrier(positions: Sequence[float], values: Sequence[float], baseline: Baseline = "line") -> Barrier:
    """Return the barrier of values along a line, its two ends first and last.

    "line": max over α of L(α) − ((1 − α)·L(0) + α·L(1)), never below 0 (arXiv:2110.06296). "mean": max L − (L(0) + L(1))/2,
    the instability of arXiv:1912.05671; the two agree when the ends do. A value that is not finite is an infinite barrier.

    Raises:
        ConfigError: fewer than two points, or an unknown baseline.

    >>> barrier([0, 0.5, 1], [1.0, 3.0, 2.0])
    Barrier(height=1.5, position=0.5)
    """
    if baseline not in ("line", "mean"):
        raise ConfigError(f"There is no baseline {baseline!r}: {did_you_mean(baseline, ['line', 'mean'])}")
    if len(positions) < 2 or len(positions) != len(values):
        raise ConfigError(
            f"A barrier needs two points and a value at each; here are {len(positions)} and {len(values)}."
        )
    first, last, start, end = positions[0], positions[-1], values[0], values[-1]
    best = Barrier(-math.inf, float(first))
    for position, value in zip(positions, values, strict=True):
        share = (position - first) / (last - first)
        below = (1 - share) * start + share * end if baseline == "line" else (start + end) / 2
        height = value - below
        if not math.isfinite(height):
            return Barrier(math.inf, float(position))
        if height > best.height:
            best = Barrier(height, float(position))
    return best


def along(loads: Sequence[Load], evaluate: Evaluate, steps: int = 11, batch: int = 1) -> Path:
    """Evaluate the straight lines through models, in their order: θ(k + α) = (1 − α)·θ_k + α·θ_{k+1}.

    Between an initialisation and a trained model this is the path of arXiv:1412.6544.

    Args:
        loads: read two or more models; two are in memory, and as many points as `batch` says.
        evaluate: smaller is better.
        steps: points of a line, both ends included; models in the middle are evaluated once.
        batch: points given to `evaluate` at once.

    Raises:
        ConfigError: fewer than two models or steps.
        soups.errors.WeightsError: models that do not fit each other.
    """
    if len(loads) < 2 or steps < 2:
        raise ConfigError(f"A path needs two models and two steps, not {len(loads)} and {steps}.")
    positions = [
        round(number + step / (steps - 1), 12)
        for number in range(len(loads) - 1)
        for step in range(0 if number == 0 else 1, steps)
    ]

    def points() -> Iterator[dict[str, Tensor]]:
        ends: list[Weights] = [loads[0]()]
        for number, load in enumerate(loads[1:]):
            ends = [ends[-1], load()]
            for step in range(0 if number == 0 else 1, steps):
                share = step / (steps - 1)
                yield _between(ends[0], ends[1], share)

    return Path(positions, _columns(in_batches(points(), evaluate, batch)))


def barriers(
    loads: Mapping[str, Load], evaluate: Evaluate, steps: int = 3, batch: int = 1
) -> dict[str, dict[tuple[str, str], Barrier]]:
    """Return the barriers between all pairs of models, by number and pair of names.

    M models need M + (steps − 2)·M(M − 1)/2 evaluations; ends are evaluated once. Three steps are the ends and the middle,
    where barriers of one hump are highest.

    Args:
        loads: by name; two models are in memory at a time.
        evaluate: smaller is better.
        steps: points of each line, both ends included.
        batch: points given to `evaluate` at once.

    Raises:
        ConfigError: fewer than three steps.
    """
    if steps < 3:
        raise ConfigError(f"A barrier between two models needs three steps, not {steps}: the ends have none.")
    ends = dict(zip(loads, in_batches((dict(load()) for load in loads.values()), evaluate, batch), strict=True))
    shares = [step / (steps - 1) for step in range(1, steps - 1)]
    result: dict[str, dict[tuple[str, str], Barrier]] = {}
    for one, two in combinations(loads, 2):
        first, second = loads[one](), loads[two]()
        middle = in_batches((_between(first, second, share) for share in shares), evaluate, batch)
        for name in ends[one]:
            values = [ends[one][name], *(numbers[name] for numbers in middle), ends[two][name]]
            result.setdefault(name, {})[one, two] = barrier([0.0, *shares, 1.0], values)
    return result


def in_batches(points: Iterable[Weights], evaluate: Evaluate, batch: int) -> list[Numbers]:
    """Return the numbers of many weights, of which `batch` are made and evaluated at a time.

    Raises:
        ConfigError: a batch below 1.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}: at least one point is evaluated at a time.")
    result: list[Numbers] = []
    waiting: list[Weights] = []
    for weights in points:
        waiting.append(weights)
        if len(waiting) == batch:
            result += evaluate(waiting)
            waiting.clear()
    return result + list(evaluate(waiting)) if waiting else result


def _between(first: Weights, second: Weights, share: float) -> dict[str, Tensor]:
    return point([lambda: first, lambda: second], [1 - share, share])


def _columns(rows: Sequence[Numbers]) -> dict[str, list[float]]:
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
