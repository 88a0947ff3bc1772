"""Optimisers without gradients. Each asks for points to try and learns their scores; it evaluates nothing itself.

An optimiser that is asked and told in the same order gives the same points, so a search that was interrupted is continued by
telling it the recorded scores again.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import torch

from soups.errors import ConfigError, install
from soups.seeding import derive_seed, generator

Proposal = TypeVar("Proposal")
Point = list[float]


class Optimiser(Protocol[Proposal]):
    """Proposes points and learns their scores."""

    def ask(self) -> Proposal | None:
        """Return the next point to try; None when the search is over."""
        ...

    def tell(self, point: Proposal, score: float) -> None:
        """Take the score of a point that was asked for; larger is better."""
        ...


class Points:
    """Points that are given, one after another.

    >>> Points([[0.0], [0.5]]).ask()
    [0.0]
    """

    def __init__(self, points: Sequence[Sequence[float]]) -> None:
        self._left = iter([list(point) for point in points])

    def ask(self) -> Point | None:
        """Return the next point."""
        return next(self._left, None)

    def tell(self, point: Point, score: float) -> None:
        """Do nothing: the points are fixed."""


class Grid:
    """Every combination of the candidates, in order.

    Args:
        space: parameters; a list holds candidates, anything else is fixed (a tuple is one value a model).

    >>> grid = Grid({"density": [0.1, 0.2], "scale": 1.0})
    >>> grid.ask(), grid.ask(), grid.ask()
    ({'density': 0.1, 'scale': 1.0}, {'density': 0.2, 'scale': 1.0}, None)

    Raises:
        ConfigError: a list without candidates.
    """

    def __init__(self, space: Mapping[str, Any]) -> None:
        for name, candidates in space.items():
            if isinstance(candidates, list) and not candidates:
                raise ConfigError(f"There are no candidates for {name!r}; give at least one.")
        lists = [cast("list[Any]", value) if isinstance(value, list) else [value] for value in space.values()]
        self._combinations = (dict(zip(space, values, strict=True)) for values in itertools.product(*lists))

    def ask(self) -> dict[str, Any] | None:
        """Return the next combination."""
        return next(self._combinations, None)

    def tell(self, point: Mapping[str, Any], score: float) -> None:
        """Do nothing: a grid does not learn."""


class Random:
    """The start, then points drawn evenly from a box.

    Args:
        start: the first point.
        bounds: (low, high) of every coordinate.
        evaluations: how many points in all.
        seed: of the draws.
    """

    def __init__(self, start: Sequence[float], bounds: tuple[float, float], evaluations: int, seed: int) -> None:
        self._start, self._bounds, self._evaluations, self._seed = list(start), bounds, evaluations, seed
        self._asked = 0

    def ask(self) -> Point | None:
        """Return the next point."""
        if self._asked == self._evaluations:
            return None
        self._asked += 1
        if self._asked == 1:
            return self._start
        low, high = self._bounds
        source = generator(self._seed, "random search", self._asked)
        drawn = torch.rand(len(self._start), generator=source, dtype=torch.float64)
        return (low + (high - low) * drawn).tolist()

    def tell(self, point: Point, score: float) -> None:
        """Do nothing: the draws do not depend on scores."""


class Cobyla:
    """Powell's COBYLA in a box, as SciPy has it; no seed, the path depends on the scores alone.

    LoraHub's optimiser (NGOpt of nevergrad) is COBYLA at its sizes (up to 20 coordinates, 40 evaluations).

    Args:
        start: the first point.
        bounds: (low, high) of every coordinate.
        evaluations: at most so many; SciPy needs two more than there are coordinates.
        step: size of the first moves.

    Raises:
        ConfigError: too few evaluations.
    """

    def __init__(
        self, start: Sequence[float], bounds: tuple[float, float], evaluations: int, step: float = 0.25
    ) -> None:
        if evaluations < len(start) + 2:
            raise ConfigError(
                f"evaluations={evaluations}: COBYLA needs at least {len(start) + 2} for {len(start)} coefficients. Raise "
                f"the budget, choose a coarser granularity, or optimiser='random'."
            )
        self._start, self._bounds, self._evaluations, self._step = list(start), bounds, evaluations, step
        self._asked: queue.Queue[Point | BaseException | None] = queue.Queue()
        self._scores: queue.Queue[float] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._count = 0

    def _run(self) -> None:
        from scipy.optimize import minimize  # SciPy takes a second to import

        def value(point: Any) -> float:
            low, high = self._bounds  # COBYLA keeps constraints only in the limit: points outside count as the border
            self._asked.put([min(max(float(number), low), high) for number in point])
            return -self._scores.get()

        try:
            options = {"maxiter": self._evaluations, "rhobeg": self._step}
            bounds = [self._bounds] * len(self._start)
            minimize(value, self._start, method="COBYLA", bounds=bounds, options=options)
        except BaseException as error:
            self._asked.put(error)
        else:
            self._asked.put(None)

    def ask(self) -> Point | None:
        """Return the next point."""
        if self._count == self._evaluations:
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        found = self._asked.get()
        if isinstance(found, BaseException):
            raise found
        self._count += found is not None
        return found

    def tell(self, point: Point, score: float) -> None:
        """Take the score of the last point."""
        self._scores.put(score)


class CmaEs:
    """CMA-ES (Hansen, arXiv:1604.00772) from the package `cma`, in a box.

    Args:
        start: the mean of the first generation.
        bounds: (low, high) of every coordinate.
        evaluations: how many points in all.
        seed: of the draws.
        sigma: standard deviation of the first generation.

    Raises:
        ConfigError: the package is not installed, or fewer than two coordinates.
    """

    def __init__(
        self, start: Sequence[float], bounds: tuple[float, float], evaluations: int, seed: int, sigma: float = 1 / 6
    ) -> None:
        module = _import_cma()
        if len(start) < 2:
            raise ConfigError(
                "CMA-ES needs at least two coefficients; for one use optimiser='grid' or optimiser='cobyla'."
            )
        options = {"bounds": list(bounds), "seed": derive_seed(seed, "cma") % (2**31 - 1) + 1, "verbose": -9}
        self._strategy: Any = module.CMAEvolutionStrategy(list(start), sigma, options)
        self._evaluations, self._asked = evaluations, 0
        self._waiting: list[Any] = []
        self._told: list[tuple[Any, float]] = []
        self._generation = 0

    def ask(self) -> Point | None:
        """Return the next point."""
        if self._asked == self._evaluations:
            return None
        if not self._waiting:
            if self._strategy.stop():
                return None
            self._waiting = list(self._strategy.ask())
            self._told, self._generation = [], len(self._waiting)
        self._asked += 1
        return [float(number) for number in self._waiting[0]]

    def tell(self, point: Point, score: float) -> None:
        """Take the score of the last point; a whole generation moves the distribution."""
        self._told.append((self._waiting.pop(0), -score))
        if len(self._told) == self._generation:
            points, values = zip(*self._told, strict=True)
            self._strategy.tell(list(points), list(values))


def _import_cma() -> ModuleType:
    try:
        import cma
    except ImportError as error:
        raise ConfigError(f"optimiser='cma' needs the package cma: {install('cma')}.") from error
    return cast(ModuleType, cma)
