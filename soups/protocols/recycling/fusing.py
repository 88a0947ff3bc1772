"""Fusing (arXiv:2204.03044): average models fine-tuned on other tasks into a better start for the target task."""

from __future__ import annotations

from collections.abc import Mapping

from soups.fitting import FitSpec
from soups.protocols.recycling.plan import ModelComparison, TargetTask, at_least_two, compare, mean


def fusing(target: TargetTask, auxiliary: Mapping[str, FitSpec]) -> ModelComparison:
    """Return the plan: average the auxiliary backbones, fine-tune the result on the target, and compare.

    The comparison is with starting from the pretrained backbone and from each auxiliary backbone alone (intertraining).

    Args:
        target: the task that all models are for.
        auxiliary: fits on the auxiliary tasks, by name.

    Raises:
        soups.errors.ConfigError: fewer than two auxiliary tasks.
    """
    at_least_two(auxiliary)
    backbones = {name: target.auxiliary(name, spec) for name, spec in auxiliary.items()}
    models = {"from pretrained": target.fit(target.start(), "pretrained")}
    for name, backbone in backbones.items():
        models[f"from {name}"] = target.fit(target.start(backbone, name), name)
    fused = mean(list(backbones.values()), "backbone.mean", "average the auxiliary backbones")
    models["from the fused backbone"] = target.fit(target.start(fused, "fused"), "the fused backbone")
    return compare(target, models, {"from one auxiliary task (mean)": [f"from {name}" for name in backbones]})
