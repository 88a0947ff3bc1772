"""Model Ratatouille (arXiv:2212.10445): fine-tune the target from several auxiliary bodies, then average the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soups.protocols.recycling import Judged, Target, judged, mean, some


def ratatouille(target: Target, auxiliary: Mapping[str, Mapping[str, Any]]) -> Judged:
    """Return the plan: every member has the same probed head and the body of another auxiliary task.

    It is compared with as many members from the pretrained body (the uniform soup of DiWA, arXiv:2205.09739), which differ
    in their seeds, and with fusing the same bodies before the target (arXiv:2204.03044).

    Args:
        target: the task that all is for.
        auxiliary: parameters of the auxiliary tasks' data, by name.

    Raises:
        soups.errors.ConfigError: fewer than two auxiliary tasks.
    """
    some(auxiliary)
    bodies = {name: target.auxiliary(name, data) for name, data in auxiliary.items()}
    start = target.start()
    vanilla = {f"vanilla {n}": target.fit(start, f"pretrained, {n}", number=n) for n in range(1, len(bodies) + 1)}
    recycled = {
        f"from {name}": target.fit(start, name, body=body, number=n) for n, (name, body) in enumerate(bodies.items(), 1)
    }
    fused = mean(list(bodies.values()), "body.mean", "fuse the auxiliary bodies")
    models = {
        **vanilla,
        "uniform soup": mean(list(vanilla.values()), "target.mean", "average the vanilla members"),
        **recycled,
        "ratatouille": mean(list(recycled.values()), "target.mean", "average the recycled members"),
        "fusing": target.fit(start, "the fused body", body=fused, number=1),
    }
    return judged(target, models, {"vanilla (mean)": list(vanilla), "recycled members (mean)": list(recycled)})
