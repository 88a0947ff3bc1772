"""DAM (differentiable adaptive merging): a factor for every column of every model, by distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soups.coefficients.fitting import Fitted, fit, mean_cosine
from soups.coefficients.mixture import Checkpoint, Mixture
from soups.coefficients.suite_objective import Suite


def dam(
    models: Mapping[str, Checkpoint],
    suite: Suite,
    *,
    lr: float = 1e-3,
    steps: int = 500,
    diversity: float = 0.01,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Fit θ = Σᵢ mᵢ ∘ θᵢ with one factor a column of each whole model (arXiv:2410.08371).

    A column is a position of a tensor's last axis; a tensor of one axis has one factor. The loss is the KL divergence to each
    model's predictions on its own task at temperature 2, plus `diversity` times the mean cosine of the models' factors; the
    optimiser is AdamW, a sample of each task a step.

    Args:
        models: by task.
        suite: the tasks, with heads; its experts are the teachers.
        lr: of AdamW.
        steps: one sample a task each.
        diversity: weight of the penalty.
        seed: of the samples.
        options: `fit`'s.
    """
    settings: dict[str, Any] = {"batch_size": 1, **options}
    with Mixture(None, models, granularity="column") as mixture:
        return fit(
            mixture, "kl", suite=suite, optimiser="adamw", lr=lr, steps=steps, seed=seed,
            penalty=lambda found: diversity * mean_cosine(found), **settings,
        )  # fmt: skip
