"""AdaMerging: coefficients of task vectors, by the entropy of the merged model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from soups.coefficients.fitting import Fitted, fit
from soups.coefficients.mixture import Checkpoint, Mixture
from soups.coefficients.suite_objective import Suite
from soups.errors import ConfigError, did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    "authors": {"link": "clamp", "repeats": 2, "steps": 500},
    "fusionbench": {"link": "none", "repeats": 1, "steps": 1000},
}


def adamerging(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    suite: Suite,
    *,
    per: Literal["task", "layer"] = "layer",
    preset: str = "authors",
    start: float = 0.3,
    lr: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Fit AdaMerging's coefficients (arXiv:2310.02575).

    θ = θ₀ + Σₜ λₜ τₜ with one λ a task ("task"), or one a task and tensor ("layer"), minimises the sum over the tasks of the mean
    entropy of the predictions on unlabelled inputs. The authors adapt on test inputs; here it is the adaptation split unless
    `split="test"` is given, which the result names. Entropy can fall while accuracy falls: compare `accuracy["start"]` and
    `["fitted"]`, or use `symerge`.

    Args:
        base: the base model.
        experts: by task.
        suite: the tasks, with heads.
        per: "task" or "layer".
        preset: "authors" (λ clamped to [0, 1] in the forward pass, two batches of 16 a task and step, 500 steps) or
            "fusionbench" (not clamped, one batch, 1,000 steps).
        start: every λ at the start.
        lr: of Adam.
        seed: of the batches.
        options: `fit`'s, over the preset's.

    Raises:
        ConfigError: an unknown preset or granularity.
    """
    if preset not in PRESETS:
        raise ConfigError(f"There is no preset {preset!r}: {did_you_mean(preset, PRESETS)}")
    if per not in ("task", "layer"):
        raise ConfigError(f"per={per!r}: {did_you_mean(per, ('task', 'layer'))}")
    settings = {**PRESETS[preset], **options}
    granularity = "model" if per == "task" else "tensor"
    with Mixture(base, experts, granularity=granularity, link=settings.pop("link"), start=start) as mixture:
        return fit(mixture, "entropy", suite=suite, optimiser="adam", lr=lr, seed=seed, **settings)
