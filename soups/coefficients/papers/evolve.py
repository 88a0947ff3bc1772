"""Evolutionary merging: coefficients of groups of layers by CMA-ES, on a score of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from soups.coefficients.fitting import Fitted, fit
from soups.coefficients.mixture import Checkpoint, Mixture
from soups.coefficients.suite_objective import Suite
from soups.weights import Weights


def evolve(
    base: Checkpoint | None,
    models: Mapping[str, Checkpoint],
    score: Callable[[Weights], float] | None = None,
    *,
    suite: Suite | None = None,
    groups: str | Sequence[str] | None = None,
    start: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.5),
    evaluations: int = 100,
    seed: int = 0,
    resume: Path | None = None,
) -> Fitted:
    """Search the coefficients of models by CMA-ES (the parameter space of arXiv:2403.13187).

    Args:
        base: the base model, for task vectors; None mixes whole models.
        models: by name.
        score: of merged weights on held-out data, larger is better; the suite's mean held-out accuracy when None.
        suite: the tasks.
        groups: one coefficient a model and group of tensors: see `soups.coefficients.granularity.assign_rows`; one a model when
            None.
        start: every coefficient at the start; 1 / models when None.
        bounds: of each coefficient.
        evaluations: how many merged models are scored.
        seed: of the draws.
        resume: a file that keeps the trials.
    """
    granularity = "model" if groups is None else "group"
    first = 1 / len(models) if start is None and models else start
    with Mixture(base, models, granularity=granularity, groups=groups, start=first) as mixture:
        return fit(
            mixture, score or "accuracy", suite=suite, optimiser="cma", evaluations=evaluations, bounds=bounds, seed=seed,
            resume=resume,
        )  # fmt: skip
