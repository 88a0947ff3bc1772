"""Model Ratatouille (arXiv:2212.10445): fine-tune the target from several auxiliary backbones, then average the results."""

from __future__ import annotations

from collections.abc import Mapping

from soups.fitting import FitSpec
from soups.protocols.recycling.plan import ModelComparison, TargetTask, at_least_two, compare, mean


def ratatouille(target: TargetTask, auxiliary: Mapping[str, FitSpec]) -> ModelComparison:
    """Return the plan: every fit has the same probed head and the backbone of another auxiliary task.

    It is compared with as many fits from the pretrained backbone (the uniform soup of DiWA, arXiv:2205.09739), which differ
    in their seeds, and with fusing the same backbones before the target (arXiv:2204.03044).

    Args:
        target: the task that all models are for.
        auxiliary: fits on the auxiliary tasks, by name.

    Raises:
        soups.errors.ConfigError: fewer than two auxiliary tasks.
    """
    at_least_two(auxiliary)
    backbones = {name: target.auxiliary(name, spec) for name, spec in auxiliary.items()}
    start = target.start()
    vanilla = {f"vanilla {n}": target.fit(start, f"pretrained, {n}", number=n) for n in range(1, len(backbones) + 1)}
    recycled = {
        f"from {name}": target.fit(start, name, backbone=backbone, number=n)
        for n, (name, backbone) in enumerate(backbones.items(), 1)
    }
    fused = mean(list(backbones.values()), "backbone.mean", "average the auxiliary backbones")
    models = {
        **vanilla,
        "uniform soup": mean(list(vanilla.values()), "target.mean", "average the vanilla fits"),
        **recycled,
        "ratatouille": mean(list(recycled.values()), "target.mean", "average the recycled fits"),
        "fusing": target.fit(start, "the fused backbone", backbone=fused, number=1),
    }
    return compare(target, models, {"vanilla (mean)": list(vanilla), "recycled fits (mean)": list(recycled)})
