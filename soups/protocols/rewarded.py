"""Rewarded soups (arXiv:2306.04488): one model fine-tuned to each reward from one start, and the weights between them.

θ_λ = Σ λᵢ θᵢ costs nothing to make for any preference λ. The straight line Σ λᵢ R(θᵢ) between the rewards of the ends is
what mixing the models' answers would give; multi-objective training (MORL), one fit for each λ on Σ λᵢ Rᵢ, is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.protocols.plan import Node, Plan
from soups.weights import Weights, check_same

Settings = Mapping[str, Any]


def interpolate(models: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return θ_λ = Σ λᵢ θᵢ, computed in float64 and rounded once.

    Args:
        models: weights of equal names and shapes.
        shares: λᵢ, which sum to 1.

    Raises:
        ConfigError: shares that do not fit.
        soups.errors.WeightsError: models that do not.

    >>> interpolate([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [0.75, 0.25])["w"]
    tensor([1.])
    """
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-9:
        raise ConfigError(f"{len(models)} models need as many shares with the sum 1, not {list(shares)}.")
    for number, weights in enumerate(models[1:], 2):
        check_same(models[0], weights, where=f"model {number}")
    return {
        name: sum(
            (share * weights[name].double() for share, weights in zip(shares, models, strict=True)),
            torch.zeros_like(first, dtype=torch.float64),
        ).to(first.dtype)
        for name, first in models[0].items()
    }


@dataclass(frozen=True)
class Study:
    """What a run is made of; every field decides results.

    Attributes:
        shares: λ of the first reward, each in (0, 1); the second one's is 1 − λ.
        multi_objective: those of them that a reference is trained for.
        candidates: K texts that a policy chooses from.
        choices: sets of candidates to train on.
        kl: weight of the divergence from the start.
        seed: of everything that is random.
    """

    shares: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    multi_objective: Sequence[float] = (0.4, 0.6)
    candidates: int = 4
    choices: int = 160
    kl: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shares or any(not 0 < share < 1 for share in (*self.shares, *self.multi_objective)):
            raise ConfigError("protocol.study.shares and .multi_objective are λ between 0 and 1, the ends left out.")
        if self.candidates < 2 or self.choices < 1:
            raise ConfigError("protocol.study.candidates must be at least 2, and .choices at least 1.")


@dataclass(frozen=True)
class Layout:
    """The nodes: the two ends' scores (λ = 1 and λ = 0), those of the interpolations, and of the references, by λ."""

    ends: dict[float, Node]
    soups: dict[float, Node]
    references: dict[float, Node]

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan((*self.ends.values(), *self.soups.values(), *self.references.values()))


def layout(study: Study, common: Settings, scoring: Settings) -> Layout:
    """Lay out a study as nodes.

    Args:
        study: its sizes and seed.
        common: what decides every fit; plain JSON values.
        scoring: what decides which texts are scored.
    """

    def fit(share: float) -> Node:
        parameters = {
            **common, "share": share, "candidates": study.candidates, "choices": study.choices, "kl": study.kl,
            "seed": study.seed,
        }  # fmt: skip
        return Node("train", "policy", parameters, (), f"policy for λ = {share:g}")

    def scores(node: Node) -> Node:
        return Node("score", "scores", dict(scoring), (node,), f"scores of {node.name}")

    first, second = fit(1.0), fit(0.0)
    soups = {
        share: Node("merge", "interpolate", {"share": share}, (first, second), f"θ at λ = {share:g}")
        for share in sorted(study.shares)
    }
    return Layout(
        {1.0: scores(first), 0.0: scores(second)},
        {share: scores(node) for share, node in soups.items()},
        {share: scores(fit(share)) for share in sorted(study.multi_objective)},
    )
