"""The plan of a ColD Fusion study: rounds, what they are compared with, and how each base is judged.

Operations that the plan names, done by `soups.launch.cold_fusion`:

- ``cold.init`` makes the repository ``parameters["repository"]`` with the pretrained body as base 0;
- ``cold.contribute`` fine-tunes a base on one task, from a probed head, and pushes; ``cold.fuse`` makes the round;
- ``cold.contributor`` is a process that comes and goes (asynchronous mode); ``cold.base`` is what a round left;
- ``cold.multitask`` trains one body on the pooled tasks, the reference;
- ``cold.probe`` and ``cold.fine_tune`` judge a body on a task: frozen (all and few examples), and fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from soups.errors import ConfigError
from soups.protocols.plan import Node, Plan
from soups.seeding import derive_seed, generator

Mode = Literal["synchronous", "asynchronous"]


@dataclass(frozen=True)
class Study:
    """What a ColD Fusion study is of.

    Attributes:
        model: parameters that decide base 0.
        training: parameters that decide a fit, its data and seed apart.
        seen: contributors' tasks by name, each with the parameters of its data.
        unseen: tasks that nobody contributes.
        rounds: rounds to make.
        per_round: contributors sampled for each (synchronous), or contributions that make a round (asynchronous).
        policy: of the repository; its quorum is `per_round`.
        seed: of the sampling and of the fits.
        fine_tuned: rounds whose bases are also judged by fine-tuning; negative ones count from the last.
        shots: training examples of the few-shot probe.
        multitask_epochs: of the multitask reference; 0 leaves it out.
        mode: synchronous rounds, or contributors that come and go.
        contributors: processes in asynchronous mode.
        checked: tasks of the fusers' held-out check, with the parameters of their data; empty without one.
    """

    model: Mapping[str, Any]
    training: Mapping[str, Any]
    seen: Mapping[str, Mapping[str, Any]]
    unseen: Mapping[str, Mapping[str, Any]]
    rounds: int
    per_round: int
    policy: Mapping[str, Any]
    seed: int = 0
    fine_tuned: Sequence[int] = (0, -1)
    shots: int = 50
    multitask_epochs: int = 0
    mode: Mode = "synchronous"
    contributors: int = 4
    checked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        if self.mode not in ("synchronous", "asynchronous"):
            raise ConfigError(f"protocol.mode={self.mode} must be synchronous or asynchronous.")
        if not self.seen:
            raise ConfigError("protocol.tasks names no task; ColD Fusion needs at least one contributor.")
        if both := sorted(set(self.seen) & set(self.unseen)):
            raise ConfigError(f"The task {both[0]!r} is both seen and unseen.")
        if self.rounds < 1:
            raise ConfigError(f"protocol.rounds={self.rounds} must be at least 1.")
        most = len(self.seen) if self.mode == "synchronous" else self.contributors
        if not 1 <= self.per_round <= most:
            raise ConfigError(
                f"protocol.per_round={self.per_round} must be between 1 and {most}, the contributors there are."
            )


@dataclass(frozen=True)
class Layout:
    """The plan's nodes by what they mean.

    Attributes:
        bases: base 0, 1, …
        chosen: tasks of each round, in synchronous mode.
        models: what is judged, by name: "pretrained", "round 1", …, "fused once", "multitask".
        probes, fine_tuned: score nodes by model and task.
    """

    bases: list[Node]
    chosen: list[list[str]]
    models: dict[str, Node]
    probes: dict[tuple[str, str], Node] = field(default_factory=dict[tuple[str, str], Node])
    fine_tuned: dict[tuple[str, str], Node] = field(default_factory=dict[tuple[str, str], Node])

    def plan(self) -> Plan:
        """Return the plan that judges everything."""
        return Plan((*self.bases, *self.models.values(), *self.probes.values(), *self.fine_tuned.values()))


def sampled(names: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """Return which contributors take part in a round: `count` of `names` without repetition, by seed and round.

    >>> sampled(["a", "b", "c"], 3, 0, 1)
    ['a', 'b', 'c']
    """
    order = torch.randperm(len(names), generator=generator(seed, "contributors", number))[:count]
    return [names[int(index)] for index in sorted(order.tolist())]


def layout(study: Study) -> Layout:
    """Return the nodes of a study.

    Raises:
        ConfigError: see `Study.check`.
    """
    study.check()
    names = list(study.seen)
    init = _init(study, "main")
    bases, chosen = _asynchronous(study, init) if study.mode == "asynchronous" else _rounds(study, init)
    models = {"pretrained": init, **{f"round {number}": node for number, node in enumerate(bases) if number}}
    if study.mode == "synchronous" and study.per_round < len(names):
        first = _init(study, "once")
        models["fused once"] = _fuse(study, first, [_contribute(study, first, name, 1) for name in names], 1)
    elif study.mode == "synchronous":
        models["fused once"] = bases[1]  # with everybody in the first round, that is what it is
    if study.multitask_epochs:
        parameters = {"data": dict(study.seen), "training": dict(study.training), "epochs": study.multitask_epochs}
        parameters["seed"] = derive_seed(study.seed, "multitask") % 2**31
        models["multitask"] = Node("train", "cold.multitask", parameters, (init,), "multitask on the pooled data")
    found = Layout(bases, chosen, models)
    last = study.rounds
    judged = {f"round {number % (last + 1) if number < 0 else number}" for number in study.fine_tuned}
    judged = {"pretrained" if name == "round 0" else name for name in judged} | {"fused once", "multitask"}
    for model, node in models.items():
        for task, data in (*study.seen.items(), *study.unseen.items()):
            parameters = {
                "data": dict(data),
                "input": study.training["input"],
                "shots": study.shots,
                "seed": study.seed,
            }
            found.probes[model, task] = Node("score", "cold.probe", parameters, (node,), f"probe {task}, {model}")
            if model in judged:
                seed = derive_seed(study.seed, "judge", task) % 2**31
                parameters = {"data": dict(data), "training": dict(study.training), "seed": seed}
                label = f"fine-tune {task}, {model}"
                found.fine_tuned[model, task] = Node("train", "cold.fine_tune", parameters, (node,), label)
    return found


def _init(study: Study, repository: str) -> Node:
    policy = {**study.policy, "quorum": 1 if study.mode == "synchronous" else study.per_round}
    parameters: dict[str, Any] = {"model": dict(study.model), "repository": repository, "policy": policy}
    if study.checked:
        parameters["checked"] = {name: dict(data) for name, data in study.checked.items()}
        parameters["input"] = study.training["input"]
    return Node("merge", "cold.init", parameters, (), "base 0")


def _contribute(study: Study, base: Node, task: str, number: int) -> Node:
    seed = derive_seed(study.seed, "contribution", task, number) % 2**31
    parameters = {"task": task, "data": dict(study.seen[task]), "training": dict(study.training), "seed": seed}
    return Node("train", "cold.contribute", parameters, (base,), f"round {number}: {task}")


def _fuse(study: Study, base: Node, contributions: Sequence[Node], number: int) -> Node:
    return Node("merge", "cold.fuse", {"round": number}, (base, *contributions), f"round {number}: fuse")


def _rounds(study: Study, init: Node) -> tuple[list[Node], list[list[str]]]:
    bases, chosen = [init], list[list[str]]()
    for number in range(1, study.rounds + 1):
        chosen.append(sampled(list(study.seen), study.per_round, study.seed, number))
        contributions = [_contribute(study, bases[-1], task, number) for task in chosen[-1]]
        bases.append(_fuse(study, bases[-1], contributions, number))
    return bases, chosen


def _asynchronous(study: Study, init: Node) -> tuple[list[Node], list[list[str]]]:
    tasks = {name: dict(data) for name, data in study.seen.items()}
    contributors = tuple(
        Node(
            "train", "cold.contributor",
            {"number": number, "tasks": tasks, "training": dict(study.training), "rounds": study.rounds, "seed": study.seed},
            (init,), f"contributor {number}", optional=True,
        )
        for number in range(study.contributors)
    )  # fmt: skip
    bases = [init]
    for number in range(1, study.rounds + 1):
        bases.append(Node("merge", "cold.base", {"round": number}, (init, *contributors), f"round {number}"))
    return bases, []
