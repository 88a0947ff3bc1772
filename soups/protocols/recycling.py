"""Plans that recycle fine-tuned models for a target task: fusing, Model Ratatouille, lo-fi.

They are made of the same few nodes, done by `soups.launch.recycling`:

- ``body.fit`` fine-tunes the pretrained body on an auxiliary task and keeps the body;
- ``body.mean`` averages bodies;
- ``target.start`` puts a probed head for the target on a body;
- ``target.fit`` fine-tunes a start on the target, or on one shard of it; with a second input it takes that one's body;
- ``target.mean`` averages fine-tuned models; ``target.score`` judges one, on every split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soups.errors import ConfigError
from soups.protocols.plan import Node, Plan
from soups.seeding import derive_seed


@dataclass(frozen=True)
class Target:
    """The task that all is for.

    Attributes:
        model: parameters that decide the pretrained model.
        training: parameters that decide a fit, its data and seed apart.
        data: parameters of the target's data.
        seed: of the fits.
    """

    model: Mapping[str, Any]
    training: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int = 0

    def auxiliary(self, name: str, data: Mapping[str, Any]) -> Node:
        """Return the body fine-tuned on an auxiliary task."""
        parameters: dict[str, Any] = {"model": dict(self.model), "data": dict(data)}
        parameters["training"] = dict(self.training)
        parameters["seed"] = derive_seed(self.seed, "auxiliary", name) % 2**31
        return Node("train", "body.fit", parameters, (), f"auxiliary {name}")

    def start(self, body: Node | None = None, name: str = "pretrained") -> Node:
        """Return a start for the target: the pretrained body or another one, with a probed head."""
        parameters = {"model": dict(self.model), "data": dict(self.data), "input": self.training["input"]}
        return Node("train", "target.start", parameters, (body,) if body else (), f"probe the target, {name}")

    def fit(
        self, start: Node, name: str, *, body: Node | None = None, number: int = 0, shard: tuple[int, int] | None = None
    ) -> Node:
        """Return a model fine-tuned on the target.

        Args:
            start: whose head it starts from, and whose body where `body` is None.
            name: shown to people.
            body: the body it starts from.
            number: tells runs apart that differ in their seed alone.
            shard: (i, n): train on the i-th of n parts of the training split, with a batch of one n-th.
        """
        parameters: dict[str, Any] = {"data": dict(self.data), "training": dict(self.training)}
        parameters["shard"] = list(shard) if shard else None
        parameters["seed"] = derive_seed(self.seed, "target", number) % 2**31
        return Node("train", "target.fit", parameters, (start, body) if body else (start,), f"target from {name}")

    def score(self, model: Node, name: str) -> Node:
        """Return the node that judges a model on the target's splits."""
        return Node(
            "score",
            "target.score",
            {"data": dict(self.data), "input": self.training["input"]},
            (model,),
            f"score {name}",
        )


@dataclass(frozen=True)
class Judged:
    """The models of a study by name, in the order of the table, and the nodes that judge them.

    Attributes:
        models: what is judged.
        groups: name of the row that stands for the mean of several models, to their names.
    """

    models: dict[str, Node]
    scores: dict[str, Node]
    groups: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def plan(self) -> Plan:
        """Return the plan."""
        return Plan(tuple(self.scores.values()))


def judged(target: Target, models: Mapping[str, Node], groups: Mapping[str, Sequence[str]] | None = None) -> Judged:
    """Return the models with a score node for each."""
    kept = {name: list(members) for name, members in (groups or {}).items()}
    return Judged(dict(models), {name: target.score(node, name) for name, node in models.items()}, kept)


def mean(nodes: Sequence[Node], operation: str, name: str) -> Node:
    """Return the uniform average of several nodes' tensors."""
    return Node("merge", operation, {}, tuple(nodes), name)


def some(tasks: Mapping[str, Mapping[str, Any]], least: int = 2) -> None:
    """Check that there are auxiliary tasks to recycle.

    Raises:
        ConfigError: there are too few.
    """
    if len(tasks) < least:
        raise ConfigError(f"protocol.auxiliary names {len(tasks)} tasks; at least {least} are needed.")
