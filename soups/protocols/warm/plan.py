"""The plan of WARM: reward models from one start, their weight average, and how all are judged.

M reward models are fine-tuned from one start: one linear-probed head for all, data order, learning rate and dropout of their
own, and featurizers taken at points along one fine-tuning trajectory (Baklava). The average of their weights is one model
that is judged against their ensemble (the mean of their rewards), the median of their rewards and the best of them.

The paper ranks its members on the out-of-distribution set that it also reports; here they are ranked on a held-out split
that nothing else is reported on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from soups.errors import ConfigError
from soups.fitting import FitSpec
from soups.fitting.schema import Count, CountOrNone, Must, Positive, Section, ShareBelowOne, Target
from soups.protocols.execution import Notes
from soups.protocols.plan import Node, Parameters, Plan
from soups.protocols.warm.average import best_first


class WarmStudy(Section):
    """Sizes of a study.

    Attributes:
        members: how many are trained for each share of swapped labels.
        keep: how many of them, by held-out accuracy, are averaged.
        swapped: shares of training and held-out pairs whose labels are turned round besides their natural noise.
        rates: learning rates, taken by turns.
        dropouts: dropout rates, taken by turns among the members of equal learning rate.
        points: how many points of the trajectory the members start from, by turns; 0: all from the pretrained encoder.
        layers: depths of the networks of the feature experiment; empty leaves it out.
    """

    members: Count = 4
    keep: Count = 3
    swapped: Annotated[list[Annotated[float, Field(ge=0, lt=0.5)]], Must("shares in [0, 0.5)")] = Field(
        default_factory=lambda: [0.0, 0.25]
    )
    rates: list[Positive] = Field(default_factory=lambda: [5e-5, 1e-4])
    dropouts: list[ShareBelowOne] = Field(default_factory=lambda: [0.05, 0.1])
    points: CountOrNone = 3
    layers: list[Count] = Field(default_factory=lambda: [1, 2, 3])

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        best_first([0.0] * self.members, self.keep)
        for key in ("swapped", "rates", "dropouts"):
            if not getattr(self, key):
                raise ConfigError(f"protocol.study.{key} needs at least one value.")

    def member(self, base: FitSpec, number: int, seed: int) -> FitSpec:
        """Return the fit of member `number`, with the rate, dropout and seed that are its own."""
        rate = self.rates[number % len(self.rates)]
        dropout = self.dropouts[number // len(self.rates) % len(self.dropouts)]
        return base.with_(seed=seed * 1000 + number, optimizer={"lr": rate}, model={**base.model, "dropout": dropout})


class FitSize(Section):
    """How many pairs and epochs a fit has."""

    pairs: Count
    epochs: Count


class WarmSettings(Section):
    """The section `protocol`.

    Attributes:
        study: its sizes.
        trajectory: the fine-tuning whose points the featurizers are.
        control: the control reward model, which sees other texts and labels without noise.
        candidates: texts of the test part that best-of-N chooses from; in-distribution pairs are those among them.
        ood_texts: texts of each out-of-distribution domain.
        sizes: the N of best-of-N.
    """

    study: WarmStudy = Field(default_factory=WarmStudy)
    trajectory: FitSize
    control: FitSize
    candidates: Count = 400
    ood_texts: Count = 150
    sizes: list[Count] = Field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        self.study.check()
        if not self.sizes or max(self.sizes) > self.candidates:
            raise ConfigError(f"protocol.sizes={self.sizes} needs numbers up to protocol.candidates={self.candidates}.")


class TrajectoryParameters(Parameters):
    """Of ``trajectory``: the fit, and how many points of it are kept."""

    fit: FitSpec
    points: int


class HeadParameters(Parameters):
    """Of ``head``: the model, the pairs, the size of its inputs; the seed where weights are random."""

    model: Target
    data: Target
    size: int
    seed: int | None


class MemberParameters(Parameters):
    """Of ``member``: the fit, and the point of the trajectory that it starts from."""

    fit: FitSpec
    point: int | None


class ControlParameters(Parameters):
    """Of ``control``: the fit."""

    fit: FitSpec


class AverageParameters(Parameters):
    """Of ``warm``: how many of the members are averaged."""

    keep: int


class RewardParameters(Parameters):
    """Of ``rewards``: the model, the pairs, the size of its inputs, and which texts are given rewards."""

    model: Target
    data: Target
    size: int
    candidates: int
    ood_texts: int


class FeatureParameters(Parameters):
    """Of ``features``: depths of the networks and the seed."""

    layers: list[int]
    seed: int


class AverageNotes(Notes):
    """Of ``warm``: fingerprints of the averaged members, best first."""

    members: list[str]


class FeatureNotes(Notes):
    """Of ``features``: weights by depth and then by "ensemble" and "average", each for every probability."""

    layers: dict[str, dict[str, list[float]]]
    probabilities: list[float]


@dataclass(frozen=True)
class NoiseGroup:
    """The nodes for one share of swapped labels.

    Attributes:
        share: of swapped labels.
        data: section of the pairs.
        head: the linear probe that all members start with.
        members: the fits.
        warm: the average of the best members.
        scores: rewards of each member, in their order.
        warm_scores: rewards of the average.
    """

    share: float
    data: Mapping[str, Any]
    head: Node
    members: tuple[Node, ...]
    warm: Node
    scores: tuple[Node, ...]
    warm_scores: Node


@dataclass(frozen=True)
class WarmNodes:
    """The nodes of a study."""

    trajectory: Node | None
    groups: tuple[NoiseGroup, ...]
    control: Node
    control_scores: Node
    features: Node | None

    def plan(self) -> Plan:
        """Return the plan whose targets are all scores."""
        targets = [node for group in self.groups for node in (*group.scores, group.warm_scores)]
        more = [node for node in (self.control_scores, self.features) if node is not None]
        return Plan((*targets, *more))


def warm_nodes(settings: WarmSettings, base: FitSpec, seed: int) -> WarmNodes:
    """Return the nodes of a study.

    Args:
        settings: of the protocol.
        base: a fit on the preferences, without `swapped` and `part` in its data.
        seed: of everything that is random.

    Raises:
        ConfigError: see `WarmSettings.check`.
    """
    settings.check()
    study, path = settings.study, None
    if study.points:
        parameters = TrajectoryParameters(
            fit=constant_rate(_sized(base, settings.trajectory, "trajectory", seed)), points=study.points
        )
        path = Node("train", "trajectory", parameters, (), "trajectory")
    groups = tuple(_group(settings, base, seed, share, path) for share in study.swapped)
    judge_fit = _sized(base, settings.control, "control", seed)
    judge_fit = judge_fit.with_(data={**judge_fit.data, "rater": "all"})
    judge = Node("train", "control", ControlParameters(fit=judge_fit), (), "control reward model")
    clean = pairs_of(base, 0.0)
    judge_scores = Node("score", "rewards", _rewards(settings, base, clean), {"model": judge}, "rewards of the control")
    features = None
    if study.layers:
        parameters = FeatureParameters(layers=study.layers, seed=seed)
        features = Node("score", "features", parameters, (), "features and layers")
    return WarmNodes(path, groups, judge, judge_scores, features)


def _group(settings: WarmSettings, base: FitSpec, seed: int, share: float, path: Node | None) -> NoiseGroup:
    study, data, title = settings.study, pairs_of(base, share), f"{share:.0%} swapped"
    starts = {"trajectory": path} if path else {}
    fit = base.with_(data=data)
    random = not base.model.get("pretrained", True)
    probe = HeadParameters(model=_plain(base), data=data, size=base.loader.size, seed=seed if random else None)
    head = Node("train", "head", probe, starts, f"head, {title}")
    members = tuple(
        Node(
            "train",
            "member",
            MemberParameters(
                fit=study.member(fit, number, seed), point=number % study.points if study.points else None
            ),
            {"head": head, **starts},
            f"member {number + 1}, {title}",
        )
        for number in range(study.members)
    )
    warm = Node("merge", "warm", AverageParameters(keep=study.keep), {"members": members}, f"WARM, {title}")
    scoring = _rewards(settings, base, data)
    scores = tuple(Node("score", "rewards", scoring, {"model": node}, f"rewards of {node.name}") for node in members)
    warm_scores = Node("score", "rewards", scoring, {"model": warm}, f"rewards of {warm.name}")
    return NoiseGroup(share, data, head, members, warm, scores, warm_scores)


def pairs_of(base: FitSpec, share: float, part: str = "members") -> dict[str, Any]:
    """Return the section of the pairs of a part of the texts, with a share of swapped labels."""
    return {**base.data, "swapped": float(share), "part": part}


def _sized(base: FitSpec, size: FitSize, part: str, seed: int) -> FitSpec:
    data = {**pairs_of(base, 0.0, part), "train": size.pairs}
    return base.with_(data=data, seed=seed, trainer={"max_epochs": size.epochs})


def constant_rate(spec: FitSpec) -> FitSpec:
    """Return a fit with a constant learning rate after the warmup."""
    values = spec.plain()
    optimizer = {key: value for key, value in values["optimizer"].items() if key != "floor"}
    return FitSpec.read({**values, "optimizer": {**optimizer, "schedule": "constant"}})


def _plain(base: FitSpec) -> dict[str, Any]:
    """Return the section of the model without dropout, which does nothing in evaluation."""
    return {key: value for key, value in base.model.items() if key != "dropout"}


def _rewards(settings: WarmSettings, base: FitSpec, data: Mapping[str, Any]) -> RewardParameters:
    return RewardParameters(
        model=_plain(base),
        data=dict(data),
        size=base.loader.size,
        candidates=settings.candidates,
        ood_texts=settings.ood_texts,
    )
