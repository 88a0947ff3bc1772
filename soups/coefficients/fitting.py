"""`fit`: a mixture's coefficients, by an objective and an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.coefficients.descent import OPTIMISERS, State, descend
from soups.coefficients.mixture import Mixture
from soups.coefficients.objectives import Objective
from soups.coefficients.optimisers import CmaEs, Cobyla, Grid, Optimiser, Random
from soups.coefficients.search import search
from soups.coefficients.suite_objective import NEEDS_EXPERTS, Suite, SuiteObjective, find_task_loss
from soups.errors import ConfigError, did_you_mean
from soups.stores.files import fingerprint
from soups.weights import Weights

SEARCHES = ("grid", "random", "cobyla", "cma")


@dataclass(frozen=True)
class Fitted:
    """Fitted coefficients, and what they are worth.

    Attributes:
        coefficients: λ, float64 (rows, models); `Mixture.rows` says which row is which tensor's.
        weights: the mixture with them.
        history: the loss before each step, or the score of each trial.
        heads: fitted heads by task, if they were fitted.
        accuracy: on the held-out split by task: of "start" (task arithmetic at the first λ), "fitted", and "experts"; empty
            without a suite.
        adapted_on: the split that the coefficients were fitted on.
    """

    coefficients: Tensor
    weights: dict[str, Tensor]
    history: list[float]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    adapted_on: str = "adaptation"


def fit(
    mixture: Mixture,
    objective: str | Objective | Callable[[Weights], float] = "agreement",
    *,
    suite: Suite | None = None,
    optimiser: str = "adam",
    lr: float = 1e-3,
    steps: int = 500,
    batch_size: int = 16,
    repeats: int = 1,
    one_task: bool = False,
    fit_heads: bool = False,
    split: str = "adaptation",
    evaluations: int = 40,
    bounds: tuple[float, float] = (-1.5, 1.5),
    points: int = 11,
    penalty: Callable[[Tensor], Tensor] | None = None,
    evaluate: bool = True,
    seed: int = 0,
    resume: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, value: None,
) -> Fitted:
    """Fit a mixture's coefficients.

    Args:
        mixture: whose coefficients are moved, from where they are.
        objective: a name of `TASK_LOSSES` or "accuracy" (the mean over tasks, of the held-out split), which need a suite; an
            `Objective`, whose loss falls; or a function from weights to a score, larger is better, for optimisers without
            gradients.
        suite: the tasks.
        optimiser: with gradients "adam", "adamw", "sgd"; without "grid" (one coefficient), "random", "cobyla", "cma".
        lr, steps: of a gradient optimiser.
        batch_size, repeats, one_task, fit_heads: see `SuiteObjective`.
        split: that the coefficients are fitted on. "test" is allowed and named in the result.
        evaluations: budget of an optimiser without gradients.
        bounds: of each coefficient, for those.
        points: of the grid.
        penalty: a function of the coefficients (rows, models) that is added to the loss.
        evaluate: compare the start, the result and the experts on the held-out split.
        seed: of batches and draws.
        resume: a file that keeps the state; an interrupted fit goes on from it, to the same bits.
        on_step: told the number of each step or trial, and its loss or score.

    Raises:
        ConfigError: names that do not exist, or an objective and an optimiser that do not go together.
        StorageError: `resume` is the state of another fit.
    """
    known = [*OPTIMISERS, *SEARCHES]
    if optimiser not in known:
        raise ConfigError(f"There is no optimiser {optimiser!r}: {did_you_mean(optimiser, known)}")
    if isinstance(objective, str) and suite is None:
        raise ConfigError(
            f"objective={objective!r} is over the tasks of a suite: suite=open_suite('texts'), for example."
        )
    first = mixture.coefficients()
    start = _accuracy(suite, mixture.weights(), {}) if evaluate and suite is not None else {}
    settings = [
        mixture.identity(),
        str(objective),
        optimiser,
        lr,
        batch_size,
        repeats,
        one_task,
        fit_heads,
        split,
        seed,
    ]
    state_of = fingerprint(
        [*settings, evaluations, bounds, points, first.tolist(), getattr(suite, "fingerprint", None)]
    )
    options = {"batch_size": batch_size, "repeats": repeats, "one_task": one_task, "fit_heads": fit_heads}
    heads: dict[str, dict[str, Tensor]] = {}
    if optimiser in OPTIMISERS:
        loss = _objective(objective, mixture, suite, split, seed, options)
        weights, history = descend(
            mixture, loss, steps=steps, optimiser=optimiser, lr=lr, order=_order(loss), seed=seed, penalty=penalty,
            state=None if resume is None else State(resume, state_of), on_step=on_step,
        )  # fmt: skip
        heads = loss.heads() if isinstance(loss, SuiteObjective) else {}
    else:
        score = _score(objective, mixture, suite, split, seed, options, penalty)
        proposals = _proposals(optimiser, mixture, bounds, evaluations, points, seed)
        trials: list[float] = []

        def on_trial(trial: Any) -> None:
            trials.append(trial.score)
            on_step(len(trials), trial.score)

        found = search(mixture.at, score, proposals, journal=resume, fingerprint=state_of, on_trial=on_trial)
        mixture.set(found.best.point)
        weights, history = found.weights, trials
    accuracy: dict[str, dict[str, float]] = {}
    if evaluate and suite is not None:
        experts = {task: _accuracy(suite, suite.experts[task], {}, [task])[task] for task in suite.tasks}
        accuracy = {"start": start, "fitted": _accuracy(suite, weights, heads), "experts": experts}
    return Fitted(mixture.coefficients(), weights, history, heads, accuracy, split)


def _accuracy(
    suite: Suite, weights: Weights, heads: Mapping[str, Weights], tasks: list[str] | None = None
) -> dict[str, float]:
    return {task: float(found.accuracy) for task, found in suite.evaluate(weights, "heldout", tasks, heads).items()}


def _objective(
    objective: str | Objective | Callable[[Weights], float],
    mixture: Mixture,
    suite: Suite | None,
    split: str,
    seed: int,
    options: Mapping[str, Any],
) -> Objective:
    if isinstance(objective, str):
        if objective == "accuracy":
            raise ConfigError(
                "objective='accuracy' has no gradient: choose optimiser='cobyla', 'cma', 'random' or 'grid'."
            )
        assert suite is not None
        loss = find_task_loss(objective)
        experts = objective in NEEDS_EXPERTS
        return SuiteObjective(suite, loss, mixture.moving(), split=split, seed=seed, experts=experts, **options)
    if isinstance(objective, Objective):
        return objective
    raise ConfigError("A function of weights has no gradient: choose optimiser='cobyla', 'cma', 'random' or 'grid'.")


def _order(loss: Objective) -> Callable[[int], list[int]] | None:
    """Let each step of a suite's objective have its own number; other objectives are shuffled."""
    return (lambda number: [number]) if isinstance(loss, SuiteObjective) else None


def _score(
    objective: str | Objective | Callable[[Weights], float],
    mixture: Mixture,
    suite: Suite | None,
    split: str,
    seed: int,
    options: Mapping[str, Any],
    penalty: Callable[[Tensor], Tensor] | None,
) -> Callable[[Weights], float]:
    value: Callable[[Weights], float]
    if objective == "accuracy":
        assert suite is not None

        def accuracy(weights: Weights) -> float:
            found = _accuracy(suite, weights, {})
            return sum(found.values()) / len(found)

        value = accuracy
    elif isinstance(objective, str):
        if options["fit_heads"]:
            raise ConfigError("fit_heads needs an optimiser with gradients: adam, adamw or sgd.")
        loss = _objective(objective, mixture, suite, split, seed, options)
        assert isinstance(loss, SuiteObjective)
        value = lambda weights: -loss.value(weights)  # noqa: E731
    elif callable(objective):
        value = objective
    else:
        raise ConfigError("An objective with a gradient alone needs an optimiser with gradients: adam, adamw or sgd.")
    if penalty is None:
        return value
    return lambda weights: value(weights) - float(penalty(mixture.coefficients()))


def _proposals(
    optimiser: str, mixture: Mixture, bounds: tuple[float, float], evaluations: int, points: int, seed: int
) -> Optimiser[Any]:
    start = mixture.free.detach().reshape(-1).tolist()
    if optimiser == "grid":
        if points < 2:
            raise ConfigError(f"points={points} must be at least 2.")
        low, high = bounds
        values = [low + (high - low) * number / (points - 1) for number in range(points)]
        return _SameForAll(values, len(start))
    if optimiser == "random":
        return Random(start, bounds, evaluations, seed)
    if optimiser == "cobyla":
        return Cobyla(start, bounds, evaluations)
    return CmaEs(start, bounds, evaluations, seed)


class _SameForAll:
    """One coefficient for all rows and models, from a grid."""

    def __init__(self, values: list[float], count: int) -> None:
        self._grid, self._count = Grid({"value": values}), count

    def ask(self) -> list[float] | None:
        """Return the next point."""
        found = self._grid.ask()
        return None if found is None else [float(found["value"])] * self._count

    def tell(self, point: list[float], score: float) -> None:
        """Do nothing."""


def mean_magnitude(coefficients: Tensor) -> Tensor:
    """Return the mean of |λ|."""
    return coefficients.abs().mean()


def mean_cosine(coefficients: Tensor) -> Tensor:
    """Return the mean cosine of the coefficient vectors of two different models; 0 for one model."""
    count = coefficients.shape[1]
    if count == 1:
        return coefficients.sum() * 0
    unit = torch.nn.functional.normalize(coefficients, dim=0)
    return ((unit.T @ unit).sum() - (unit * unit).sum()) / (count * (count - 1))
