"""The plan of a ColD Fusion study: rounds, references to compare them with, and how each base is judged.

- ``cold.init`` makes a repository with the pretrained backbone as base 0;
- ``cold.contribute`` fine-tunes a base on one task, from a probed head, and pushes; ``cold.fuse`` makes the round;
- ``cold.contributor`` is a process that comes and goes (asynchronous mode); ``cold.base`` is the base that a round left;
- ``cold.multitask`` trains one backbone on the pooled tasks, the reference;
- ``cold.probe`` and ``cold.fine_tune`` judge a backbone on a task: frozen (all and few examples), and fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from soups.errors import ConfigError
from soups.fitting import FitSpec
from soups.fitting.schema import Target
from soups.protocols.cold_fusion.records import Policy
from soups.protocols.plan import Node, Parameters, Plan
from soups.seeding import derive_seed, generator

Mode = Literal["synchronous", "asynchronous"]


class InitParameters(Parameters):
    """Of ``cold.init``.

    Attributes:
        model: section of the model.
        seed: of its weights where they are not pretrained.
        repository: name of the repository.
        policy: of the repository.
        checked: data of the tasks that fusers score contributions on; empty without a held-out check.
        size: of the inputs of those tasks.
    """

    model: Target
    seed: int | None
    repository: str
    policy: Policy
    checked: dict[str, Target]
    size: int | None


class ContributeParameters(Parameters):
    """Of ``cold.contribute``: the task's name and its fit."""

    task: str
    fit: FitSpec


class FuseParameters(Parameters):
    """Of ``cold.fuse`` and ``cold.base``: the number of the round."""

    round: int


class ContributorParameters(Parameters):
    """Of ``cold.contributor``: its number, the tasks' fits, how many rounds there are, and the seed of its fits."""

    number: int
    fits: dict[str, FitSpec]
    rounds: int
    seed: int


class MultitaskParameters(Parameters):
    """Of ``cold.multitask``: the tasks' fits; the pooled fit has this seed and makes so many epochs."""

    fits: dict[str, FitSpec]
    epochs: int
    seed: int


class ProbeParameters(Parameters):
    """Of ``cold.probe``: the task's data, the size of its inputs, and how the few-shot samples are drawn."""

    data: Target
    size: int
    shots: int
    seed: int


class FineTuneParameters(Parameters):
    """Of ``cold.fine_tune``: the fit."""

    fit: FitSpec


@dataclass(frozen=True)
class ColdFusionStudy:
    """The parts of a ColD Fusion study.

    Attributes:
        seen: fits on the contributors' tasks, by name.
        unseen: fits on tasks that nobody contributes.
        rounds: rounds to make.
        per_round: contributors sampled for each (synchronous), or contributions that make a round (asynchronous).
        policy: of the repository; its quorum is set here.
        seed: of the sampling and of the fits.
        fine_tuned: rounds whose bases are also judged by fine-tuning; negative numbers count from the last.
        shots: training examples of the few-shot probe.
        multitask_epochs: of the multitask reference; 0 leaves it out.
        mode: synchronous rounds, or contributors that come and go.
        contributors: processes in asynchronous mode.
        checked: names of the seen tasks of the fusers' held-out check; empty without one.
    """

    seen: Mapping[str, FitSpec]
    unseen: Mapping[str, FitSpec]
    rounds: int
    per_round: int
    policy: Policy
    seed: int = 0
    fine_tuned: Sequence[int] = (0, -1)
    shots: int = 50
    multitask_epochs: int = 0
    mode: Mode = "synchronous"
    contributors: int = 4
    checked: Sequence[str] = ()

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        if not self.seen:
            raise ConfigError("protocol.tasks names no task; ColD Fusion needs at least one contributor.")
        if both := sorted(set(self.seen) & set(self.unseen)):
            raise ConfigError(f"The task {both[0]!r} is both seen and unseen.")
        most = len(self.seen) if self.mode == "synchronous" else self.contributors
        if not 1 <= self.per_round <= most:
            raise ConfigError(
                f"protocol.per_round={self.per_round} must be between 1 and {most}, the contributors there are."
            )
        if wrong := [number for number in self.fine_tuned if not -self.rounds - 1 <= number <= self.rounds]:
            raise ConfigError(f"protocol.fine_tuned has {wrong[0]}; there are rounds 0 to {self.rounds}.")


@dataclass(frozen=True)
class ColdFusionNodes:
    """The nodes of a study.

    Attributes:
        bases: base 0, 1, …
        chosen: tasks of each round, in synchronous mode.
        models: the judged models, by name: "pretrained", "round 1", …, "fused once", "multitask".
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


def cold_fusion_nodes(study: ColdFusionStudy) -> ColdFusionNodes:
    """Return the nodes of a study.

    Raises:
        ConfigError: see `ColdFusionStudy.check`.
    """
    study.check()
    names = list(study.seen)
    init = _init(study, "main")
    bases, chosen = _asynchronous(study, init) if study.mode == "asynchronous" else _rounds(study, init)
    models = {"pretrained": init, **{f"round {number}": node for number, node in enumerate(bases) if number}}
    if study.mode == "synchronous" and study.per_round < len(names):
        first = _init(study, "once")
        models["fused once"] = _fuse(first, [_contribute(study, first, name, 1) for name in names], 1)
    elif study.mode == "synchronous":
        models["fused once"] = bases[1]  # with everybody in the first round, it is that round's base
    if study.multitask_epochs:
        seed = derive_seed(study.seed, "multitask") % 2**31
        parameters = MultitaskParameters(fits=dict(study.seen), epochs=study.multitask_epochs, seed=seed)
        inputs = {"base": init}
        models["multitask"] = Node("train", "cold.multitask", parameters, inputs, "multitask on the pooled data")
    found = ColdFusionNodes(bases, chosen, models)
    judged = {f"round {number % (study.rounds + 1)}" for number in study.fine_tuned}
    judged = {"pretrained" if name == "round 0" else name for name in judged} | {"fused once", "multitask"}
    for model, node in models.items():
        for task, spec in (*study.seen.items(), *study.unseen.items()):
            probe = ProbeParameters(data=spec.data, size=spec.loader.size, shots=study.shots, seed=study.seed)
            inputs = {"model": node}
            found.probes[model, task] = Node("score", "cold.probe", probe, inputs, f"probe {task}, {model}")
            if model in judged:
                fit = FineTuneParameters(fit=spec.with_(seed=derive_seed(study.seed, "judge", task) % 2**31))
                label = f"fine-tune {task}, {model}"
                found.fine_tuned[model, task] = Node("train", "cold.fine_tune", fit, inputs, label)
    return found


def _init(study: ColdFusionStudy, repository: str) -> Node:
    spec = next(iter(study.seen.values()))
    quorum = 1 if study.mode == "synchronous" else study.per_round
    parameters = InitParameters(
        model=spec.model,
        seed=None if spec.model.get("pretrained", True) else spec.seed,
        repository=repository,
        policy=study.policy.model_copy(update={"quorum": quorum}),
        checked={name: study.seen[name].data for name in study.checked},
        size=spec.loader.size if study.checked else None,
    )
    return Node("merge", "cold.init", parameters, (), "base 0")


def _contribute(study: ColdFusionStudy, base: Node, task: str, number: int) -> Node:
    spec = study.seen[task].with_(seed=derive_seed(study.seed, "contribution", task, number) % 2**31)
    parameters = ContributeParameters(task=task, fit=spec)
    return Node("train", "cold.contribute", parameters, {"base": base}, f"round {number}: {task}")


def _fuse(base: Node, contributions: Sequence[Node], number: int) -> Node:
    inputs: dict[str, Any] = {"base": base, "contributions": tuple(contributions)}
    return Node("merge", "cold.fuse", FuseParameters(round=number), inputs, f"round {number}: fuse")


def _rounds(study: ColdFusionStudy, init: Node) -> tuple[list[Node], list[list[str]]]:
    bases, chosen = [init], list[list[str]]()
    for number in range(1, study.rounds + 1):
        chosen.append(sampled(list(study.seen), study.per_round, study.seed, number))
        bases.append(_fuse(bases[-1], [_contribute(study, bases[-1], task, number) for task in chosen[-1]], number))
    return bases, chosen


def _asynchronous(study: ColdFusionStudy, init: Node) -> tuple[list[Node], list[list[str]]]:
    contributors = tuple(
        Node(
            "train",
            "cold.contributor",
            ContributorParameters(number=number, fits=dict(study.seen), rounds=study.rounds, seed=study.seed),
            {"base": init},
            f"contributor {number}",
            optional=True,
        )
        for number in range(study.contributors)
    )
    bases = [init]
    for number in range(1, study.rounds + 1):
        inputs = {"base": init, "contributors": contributors}
        bases.append(Node("merge", "cold.base", FuseParameters(round=number), inputs, f"round {number}"))
    return bases, []
