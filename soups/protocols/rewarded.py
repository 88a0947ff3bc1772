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
from soups.protocols.plan import Node, Output, Plan, Work
from soups.weights import Weights, check_same

Settings = Mapping[str, Any]
# λ₁ … λₙ, which sum to 1.
Shares = tuple[float, ...]


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


def preference(given: float | Sequence[float], rewards: int = 2) -> Shares:
    """Return a preference as its shares λ₁ … λₙ.

    Args:
        given: λ of the first of two rewards, or all shares.
        rewards: n.

    Raises:
        ConfigError: shares that are no preference between so many rewards, or one reward's alone.

    >>> preference(0.25), preference([0.5, 0.25, 0.25], 3)
    ((0.25, 0.75), (0.5, 0.25, 0.25))
    """
    shares = (float(given), 1 - float(given)) if isinstance(given, int | float) else tuple(map(float, given))
    if len(shares) != rewards or abs(sum(shares) - 1) > 1e-9 or any(not 0 <= share < 1 for share in shares):
        allowed = "λ between 0 and 1" if rewards == 2 else f"lists of {rewards} shares with the sum 1"
        raise ConfigError(
            f"protocol.study.shares and .multi_objective are {allowed}, the ends left out; {given} is none of them."
        )
    return shares


def label(shares: Shares) -> str:
    """Return what people are shown: λ of the first of two rewards, or all shares."""
    return f"λ = {', '.join(f'{share:g}' for share in (shares if len(shares) > 2 else shares[:1]))}"


def corner(number: int, rewards: int) -> Shares:
    """Return the shares of one reward alone."""
    return tuple(float(number == other) for other in range(rewards))


@dataclass(frozen=True)
class Study:
    """What a run is made of; every field decides results.

    Attributes:
        shares: preferences to interpolate for, as `preference` takes them.
        multi_objective: preferences that a reference is trained for.
        seed: of everything that is random.
    """

    shares: Sequence[float | Sequence[float]] = (0.2, 0.4, 0.6, 0.8)
    multi_objective: Sequence[float | Sequence[float]] = (0.4, 0.6)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shares:
            raise ConfigError("protocol.study.shares is empty: there is nothing to interpolate for.")
        for given in (*self.shares, *self.multi_objective):
            preference(given, 2 if isinstance(given, int | float) else len(given))


@dataclass(frozen=True)
class Choosing(Study):
    """A study of policies that choose texts.

    Attributes:
        candidates: K texts that a policy chooses from.
        choices: sets of candidates to train on.
        kl: weight of the divergence from the start.
    """

    candidates: int = 4
    choices: int = 160
    kl: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2 or self.choices < 1:
            raise ConfigError("protocol.study.candidates must be at least 2, and .choices at least 1.")


@dataclass(frozen=True)
class Layout:
    """The nodes: scores of each reward's own policy in the order of the rewards, of the interpolations, of the references."""

    ends: tuple[Node, ...]
    soups: dict[Shares, Node]
    references: dict[Shares, Node]

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan((*self.ends, *self.soups.values(), *self.references.values()))


def layout(study: Study, common: Settings, scoring: Settings, rewards: int = 2) -> Layout:
    """Lay out a study as nodes: operations "policy", "interpolate" (`interpolation`) and "scores".

    Args:
        study: its preferences and seed.
        common: what decides every fit; plain JSON values.
        scoring: what decides how policies are judged.
        rewards: how many there are.

    Raises:
        ConfigError: preferences between another number of rewards.
    """

    def fit(shares: Shares) -> Node:
        parameters = {**common, **_parameters(shares), "seed": study.seed}
        return Node("train", "policy", parameters, (), f"policy for {label(shares)}")

    def scores(node: Node) -> Node:
        return Node("score", "scores", dict(scoring), (node,), f"scores of {node.name}")

    ends = tuple(fit(corner(number, rewards)) for number in range(rewards))
    soups = {
        shares: Node("merge", "interpolate", _parameters(shares), ends, f"θ at {label(shares)}")
        for shares in sorted(preference(given, rewards) for given in study.shares)
    }
    references = sorted(preference(given, rewards) for given in study.multi_objective)
    return Layout(
        tuple(map(scores, ends)),
        {shares: scores(node) for shares, node in soups.items()},
        {shares: scores(fit(shares)) for shares in references},
    )


def _parameters(shares: Shares) -> dict[str, Any]:
    """Return a node's parameters that say its shares; of two, the first says both."""
    return {"share": shares[0]} if len(shares) == 2 else {"shares": list(shares)}


def shares_of(work: Work) -> Shares:
    """Return the shares of a node of `layout`."""
    parameters = work.parameters
    if "shares" in parameters:
        return tuple(map(float, parameters["shares"]))
    share = float(parameters["share"])
    return share, 1 - share


def interpolation(work: Work) -> Output:
    """Do an "interpolate" node: θ_λ from the policies that are its inputs."""
    return Output(interpolate([work.tensors(number) for number in range(len(work.node.inputs))], shares_of(work)))
