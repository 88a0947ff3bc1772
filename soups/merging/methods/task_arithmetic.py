"""Task arithmetic: add, subtract and scale task vectors.

Editing models with task arithmetic (arXiv:2212.04089), section 2: θ = θ_0 + λ Σ τ_t; λ is chosen on held-out data.

When it fails: Task vectors interfere: the more tasks, the further their sum overshoots, so `scale` must be chosen on held-out
data.
"""

from __future__ import annotations

from soups.merging.method import PerModel
from soups.merging.stages import TaskVectors


def task_arithmetic(*, weight: PerModel = 1.0, scale: float = 0.3, normalize: bool = False) -> TaskVectors:
    """θ_0 + λ Σ w_t τ_t.

    Args:
        weight: one for all models or one for each; −1 forgets a task.
        scale: λ. 0.3 is what the literature fixes for eight tasks; 1 over the number of models gives their average.
        normalize: divide the sum by Σ w_t.
    """
    return TaskVectors(weight=weight, reduce="mean" if normalize else "sum", scale=scale)


def task_arithmetic_mergekit(*, weight: PerModel = 1.0, scale: float = 1.0, normalize: bool = False) -> TaskVectors:
    """mergekit's `task_arithmetic`: λ = 1."""
    return task_arithmetic(weight=weight, scale=scale, normalize=normalize)
