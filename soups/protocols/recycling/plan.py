"""Nodes of the plans that recycle fine-tuned models for a target task: fusing, Model Ratatouille, lo-fi.

- ``backbone.fit`` fine-tunes the pretrained backbone on an auxiliary task and keeps the backbone;
- ``backbone.mean`` averages backbones;
- ``target.start`` puts a probed head for the target on a backbone;
- ``target.fit`` fine-tunes a start on the target, or on one shard of it; it may take its backbone from another input;
- ``target.mean`` averages fine-tuned models; ``target.score`` scores a model on every split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from soups.errors import ConfigError
from soups.fitting import FitSpec
from soups.fitting.schema import Target
from soups.protocols.plan import Node, Parameters, Plan
from soups.seeding import derive_seed


class BackboneFit(Parameters):
    """Of ``backbone.fit``."""

    fit: FitSpec


class HeadProbe(Parameters):
    """Of ``target.start``: the model, the target's data, the size of its inputs; the seed where weights are random."""

    model: Target
    data: Target
    size: int
    seed: int | None


class TargetFit(Parameters):
    """Of ``target.fit``.

    Attributes:
        fit: the fit.
        shard: (i, n): train on the i-th of n parts of the training split; None: on all of it.
    """

    fit: FitSpec
    shard: tuple[int, int] | None = None


class Scoring(Parameters):
    """Of ``target.score``: the target's data and the size of its inputs."""

    data: Target
    size: int


@dataclass(frozen=True)
class TargetTask:
    """The task that all models are for.

    Attributes:
        spec: a fit on the target with the user's seed, from which every fit's own seed is derived.
    """

    spec: FitSpec

    def auxiliary(self, name: str, spec: FitSpec) -> Node:
        """Return the backbone fine-tuned on an auxiliary task, whose fit `spec` describes."""
        own = spec.with_(seed=derive_seed(self.spec.seed, "auxiliary", name) % 2**31)
        return Node("train", "backbone.fit", BackboneFit(fit=own), (), f"auxiliary {name}")

    def start(self, backbone: Node | None = None, name: str = "pretrained") -> Node:
        """Return a start for the target: the pretrained backbone or another one, with a probed head."""
        spec = self.spec
        random = not spec.model.get("pretrained", True)
        parameters = HeadProbe(
            model=spec.model, data=spec.data, size=spec.loader.size, seed=spec.seed if random else None
        )
        inputs = {"backbone": backbone} if backbone else {}
        return Node("train", "target.start", parameters, inputs, f"probe the target, {name}")

    def fit(
        self,
        start: Node,
        name: str,
        *,
        backbone: Node | None = None,
        number: int = 0,
        shard: tuple[int, int] | None = None,
    ) -> Node:
        """Return a model fine-tuned on the target.

        Args:
            start: whose head it starts from, and whose backbone where `backbone` is None.
            name: shown to people.
            backbone: the backbone it starts from.
            number: tells runs apart that differ in their seed alone.
            shard: (i, n): train on the i-th of n parts of the training split, with one n-th of the batch.

        Raises:
            ConfigError: the batch cannot be divided by n.
        """
        spec = self.spec.with_(seed=derive_seed(self.spec.seed, "target", number) % 2**31)
        if shard:
            size, rest = divmod(spec.loader.batch_size, shard[1])
            if rest or not size:
                raise ConfigError(
                    f"loader.batch_size={spec.loader.batch_size} cannot be shared out among {shard[1]} nodes."
                )
            spec = spec.with_(loader={"batch_size": size})
        inputs = {"start": start} | ({"backbone": backbone} if backbone else {})
        return Node("train", "target.fit", TargetFit(fit=spec, shard=shard), inputs, f"target from {name}")

    def score(self, model: Node, name: str) -> Node:
        """Return the node that scores a model on the target's splits."""
        parameters = Scoring(data=self.spec.data, size=self.spec.loader.size)
        return Node("score", "target.score", parameters, {"model": model}, f"score {name}")


@dataclass(frozen=True)
class ModelComparison:
    """The models of a study by name, in the order of the table, and the nodes that score them.

    Attributes:
        models: nodes of the models.
        scores: nodes of their scores.
        groups: rows that stand for the mean of several models, by name, with the names of those models.
    """

    models: dict[str, Node]
    scores: dict[str, Node]
    groups: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan(tuple(self.scores.values()))


def compare(
    target: TargetTask, models: Mapping[str, Node], groups: Mapping[str, Sequence[str]] | None = None
) -> ModelComparison:
    """Return the models with a score node for each."""
    kept = {name: list(members) for name, members in (groups or {}).items()}
    return ModelComparison(dict(models), {name: target.score(node, name) for name, node in models.items()}, kept)


def mean(nodes: Sequence[Node], operation: str, name: str) -> Node:
    """Return the uniform average of several nodes' tensors."""
    return Node("merge", operation, {}, {"models": tuple(nodes)}, name)


def at_least_two(auxiliary: Mapping[str, FitSpec]) -> None:
    """Check that there are auxiliary tasks to recycle.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(auxiliary) < 2:
        raise ConfigError(f"protocol.auxiliary names {len(auxiliary)} tasks; at least 2 are needed.")
