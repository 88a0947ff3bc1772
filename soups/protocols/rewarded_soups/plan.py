"""The plan of rewarded soups: one model fine-tuned to each reward from one start, and the weights between them.

θ_λ = Σ λᵢ θᵢ costs nothing to make for any preference λ. The straight line Σ λᵢ R(θᵢ) between the rewards of the ends is the
reward of mixing the models' answers; multi-objective training (MORL), one fit for each λ on Σ λᵢ Rᵢ, is the reference.

- ``policy`` tunes the start to λ; ``interpolate`` makes θ_λ; ``scores`` measures the rewards of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from soups.errors import ConfigError
from soups.fitting.schema import Section
from soups.protocols.execution import Output, Work
from soups.protocols.plan import Node, Parameters, Plan
from soups.protocols.rewarded_soups.interpolation import Shares, corner, interpolate, label, preference

# λ of the first of two rewards, or all shares.
Preference = float | list[float]


class RewardedStudy(Section):
    """Preferences of a study.

    Attributes:
        shares: preferences to interpolate for, as `preference` takes them.
        multi_objective: preferences that a reference is trained for.
    """

    shares: list[Preference] = Field(default_factory=lambda: list[Preference]([0.2, 0.4, 0.6, 0.8]))
    multi_objective: list[Preference] = Field(default_factory=lambda: list[Preference]([0.4, 0.6]))

    def check(self, rewards: int = 2) -> None:
        """Check the preferences.

        Raises:
            ConfigError: there are none, or some are between another number of rewards.
        """
        if not self.shares:
            raise ConfigError("protocol.study.shares is empty: there is nothing to interpolate for.")
        for given in (*self.shares, *self.multi_objective):
            preference(given, rewards)


class InterpolateParameters(Parameters):
    """Of ``interpolate``: λ."""

    shares: tuple[float, ...]


@dataclass(frozen=True)
class RewardedNodes:
    """The score nodes: of each reward's own policy in the order of the rewards, of the interpolations, of the references."""

    ends: tuple[Node, ...]
    soups: dict[Shares, Node]
    references: dict[Shares, Node]

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan((*self.ends, *self.soups.values(), *self.references.values()))


def rewarded_nodes(
    study: RewardedStudy, policy: Callable[[Shares], Parameters], scoring: Parameters, rewards: int = 2
) -> RewardedNodes:
    """Return the nodes of a study.

    Args:
        study: its preferences.
        policy: returns the parameters of the fit for a preference.
        scoring: parameters of the scores.
        rewards: how many there are.

    Raises:
        ConfigError: preferences between another number of rewards.
    """
    study.check(rewards)

    def fit(shares: Shares) -> Node:
        return Node("train", "policy", policy(shares), (), f"policy for {label(shares)}")

    def scores(node: Node) -> Node:
        return Node("score", "scores", scoring, {"policy": node}, f"scores of {node.name}")

    def between(shares: Shares) -> Node:
        inputs = {"policies": ends}
        return Node("merge", "interpolate", InterpolateParameters(shares=shares), inputs, f"θ at {label(shares)}")

    def chosen(given: Sequence[Preference]) -> list[Shares]:
        return sorted(preference(one, rewards) for one in given)

    ends = tuple(fit(corner(number, rewards)) for number in range(rewards))
    return RewardedNodes(
        tuple(map(scores, ends)),
        {shares: scores(between(shares)) for shares in chosen(study.shares)},
        {shares: scores(fit(shares)) for shares in chosen(study.multi_objective)},
    )


def interpolation(work: Work) -> Output:
    """Do an ``interpolate`` node: θ_λ from the policies."""
    policies = [work.pool.weights(node.fingerprint) for node in work.node.inputs_of("policies")]
    return Output(interpolate(policies, work.read(InterpolateParameters).shares))
