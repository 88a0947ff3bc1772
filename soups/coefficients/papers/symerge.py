"""SyMerge (Model Tinting): coefficients and heads, by agreement with the experts' predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soups.coefficients.fitting import Fitted, fit
from soups.coefficients.mixture import Checkpoint, Mixture
from soups.coefficients.suite_objective import Suite


def symerge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    suite: Suite,
    *,
    start: float = 0.3,
    lr: float = 1e-2,
    rounds: int = 500,
    fit_heads: bool = True,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Fit one coefficient a task and tensor, and each task's head, to the classes that the experts predict.

    The loss is the cross-entropy with the expert's class over the samples where the merged model agrees with it, or is not more
    confident. A step has one task; a round has one step of every task, in shuffled order, 32 samples each (the authors' code).
    Samples need no labels.

    Args:
        base: the base model.
        experts: by task.
        suite: the tasks, with heads and experts.
        start: every λ at the start.
        lr: of Adam, for coefficients and heads.
        rounds: steps of each task.
        fit_heads: fit the heads too; the result's `heads` then belong to its weights.
        seed: of batches and order.
        options: `fit`'s.
    """
    settings: dict[str, Any] = {"batch_size": 32, "one_task": True, **options}
    with Mixture(base, experts, granularity="tensor", start=start) as mixture:
        return fit(
            mixture, "agreement", suite=suite, optimiser="adam", lr=lr, steps=rounds * len(suite.tasks),
            fit_heads=fit_heads, seed=seed, **settings,
        )  # fmt: skip
