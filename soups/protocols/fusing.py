"""Fusing (arXiv:2204.03044): average models fine-tuned on other tasks into a better start for the target task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soups.protocols.recycling import Judged, Target, judged, mean, some


def fusing(target: Target, auxiliary: Mapping[str, Mapping[str, Any]]) -> Judged:
    """Return the plan: fuse the auxiliary bodies, fine-tune the result on the target, and compare.

    The comparison is with starting from the pretrained body and from each auxiliary body alone (intertraining), whose best
    is chosen on the held-out split.

    Args:
        target: the task that all is for.
        auxiliary: parameters of the auxiliary tasks' data, by name.

    Raises:
        soups.errors.ConfigError: fewer than two auxiliary tasks.
    """
    some(auxiliary)
    bodies = {name: target.auxiliary(name, data) for name, data in auxiliary.items()}
    models = {"from pretrained": target.fit(target.start(), "pretrained")}
    for name, body in bodies.items():
        models[f"from {name}"] = target.fit(target.start(body, name), name)
    fused = mean(list(bodies.values()), "body.mean", "fuse the auxiliary bodies")
    models["from the fused body"] = target.fit(target.start(fused, "fused"), "the fused body")
    return judged(target, models, {"from one auxiliary task (mean)": [f"from {name}" for name in bodies]})
