"""`+protocol=cold_fusion`: contributors on real tasks, a repository between them, and how good its bases are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as lightning
import torch

from soups.errors import ConfigError, StorageError, did_you_mean
from soups.launch.bodies import (
    Member,
    body_of,
    features,
    fit_parameters,
    frozen_names,
    heldout_accuracy,
    member,
)
from soups.launch.progress import ReportProgress
from soups.launch.quiet import quiet
from soups.launch.settings import (
    Settings,
    build_network,
    check,
    device_count,
    is_first_process,
    launched_outside,
    processes,
)
from soups.launch.tracking import member_run, node_run, summarise
from soups.protocols import Node, Operation, Output, Plan, Work
from soups.protocols.cold_fusion import Contribution, Policy, Repository, Round
from soups.protocols.cold_fusion.rounds import Layout, Study, layout
from soups.reporting.page import Curves, Page, Part, Table
from soups.seeding import derive_seed
from soups.stores.files import fingerprint
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.pooled import pooled
from soups.weights import Weights, hash_weights
from soups.worker import Message, run_in_processes


class ContributionMessage(Message):
    """A contribution to the main repository, for the processes that train it.

    Attributes:
        settings: all of them.
        base: number of the base to start from.
        task: name of the task.
        seed: of the fit.
        contributor: who pushes.
    """

    settings: Settings
    base: int
    task: str
    seed: int
    contributor: str


def contribute_in_ranks(message: ContributionMessage) -> None:
    """Make one contribution in this process, one of the ranks of its training."""
    quiet()
    section = {key: value for key, value in message.settings["protocol"].items() if key != "_target_"}
    ColdFusion(message.settings, **section).contribute(message)


class ColdFusion:
    """The protocol of `conf/protocol/cold_fusion.yaml`.

    Args:
        settings: all settings; optimiser, trainer, loader and augmentation are those of every fit.
        tasks: `data` sections of the contributors' tasks, by name.
        unseen: `data` sections of tasks that nobody contributes.
        rounds, per_round, mode, contributors, seed, fine_tuned, shots: see `Study`.
        policy: of the repository, see `Policy`; its quorum is set by `per_round`. Under `heldout`, what its fusers check:
            `tolerance`, how far below the base's the mean held-out accuracy of a contribution's linear probes may be, in
            [0, 1], and `tasks`, names of the tasks they are fitted to (all in `tasks` by default).
        multitask: train the multitask reference.
        repository: folder or URL of the repository; beside the pool's results when None.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "cold_fusion"

    def __init__(
        self,
        settings: Settings,
        tasks: Mapping[str, Mapping[str, Any] | None],
        unseen: Mapping[str, Mapping[str, Any] | None],
        rounds: int = 3,
        per_round: int = 3,
        mode: str = "synchronous",
        contributors: int = 4,
        seed: int = 0,
        policy: Mapping[str, Any] | None = None,
        fine_tuned: Sequence[int] = (0, -1),
        shots: int = 50,
        multitask: bool = True,
        repository: str | None = None,
    ) -> None:
        check(settings)
        self.settings = settings
        self.url = repository or f"{settings['pool']['path']}/repository"
        rules = dict(policy or {})
        if "quorum" in rules:
            raise ConfigError("protocol.policy.quorum is set by protocol.per_round; leave it out.")
        if "tolerance" in rules:
            raise ConfigError(
                f"protocol.policy.tolerance={rules['tolerance']} needs a score to compare: write "
                f"protocol.policy.heldout={{tolerance: {rules['tolerance']}}}."
            )
        heldout = rules.pop("heldout", None)
        if unknown := sorted(set(rules) - set(Policy.model_fields)):
            names = [*Policy.model_fields, "heldout"]
            raise ConfigError(
                f"protocol.policy.{unknown[0]} is no rule of a repository: {did_you_mean(unknown[0], names)}"
            )
        seen = {name: dict(data) for name, data in tasks.items() if data is not None}
        if heldout is not None:
            rules["tolerance"], checked = _heldout_check(heldout, list(seen))
        else:
            checked = []
        self._scores: dict[str, float] = {}
        contributions = rounds * per_round
        self.study = Study(
            model=dict(settings["model"]),
            training=fit_parameters(settings),
            seen=seen,
            unseen={name: dict(data) for name, data in unseen.items() if data is not None},
            rounds=rounds,
            per_round=per_round,
            policy=rules,
            seed=seed,
            fine_tuned=list(fine_tuned),
            shots=shots,
            # As many passes over the data, in all, as the contributors make.
            multitask_epochs=max(1, round(contributions / len(seen))) * int(settings["trainer"]["max_epochs"])
            if multitask and seen
            else 0,
            mode=cast(Any, mode),
            contributors=contributors,
            checked={name: seen[name] for name in checked},
        )

    def plan(self) -> Plan:
        """Return the plan."""
        return self.layout().plan()

    def layout(self) -> Layout:
        """Return the plan's nodes by what they mean."""
        return layout(self.study)

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan asks for."""
        return {
            "cold.init": self._init,
            "cold.contribute": self._contribute,
            "cold.fuse": self._fuse,
            "cold.contributor": self._contributor,
            "cold.base": self._base,
            "cold.multitask": self._multitask,
            "cold.probe": self._probe,
            "cold.fine_tune": self._fine_tune,
        }

    # Operations

    def repository(self, name: str) -> Repository:
        """Open one of the study's repositories."""
        return Repository(f"{self.url}/{name}")

    def _init(self, work: Work) -> Output:
        network = build_network(self.settings, 2)
        body = body_of(network)
        name = str(work.parameters["repository"])
        repository = Repository.create(
            f"{self.url}/{name}", body, Policy(**work.parameters["policy"]), frozen=frozen_names(network)
        )
        return Output(notes={"repository": name, "base": repository.manifest.base, "number": 0})

    def _start(self, work: Work) -> tuple[Repository, int, str]:
        """Return the repository, number and hash of the base that the first input left."""
        notes = work.record(0).notes
        repository = self.repository(notes["repository"])
        bases = repository.bases()
        if not any(base.hash == notes["base"] and base.number == notes["number"] for base in bases):
            raise StorageError(
                f"The pool knows base {notes['number']} ({notes['base'][:12]}), but the repository {repository.place.url} has "
                f"another or none. Use the repository that goes with the pool, or another pool (pool.path=…) for a new one."
            )
        return repository, notes["number"], notes["base"]

    def _contribute(self, work: Work) -> Output:
        repository, number, _ = self._start(work)
        parameters = work.parameters
        record, accuracy = self._fit_and_push(
            repository,
            number,
            parameters["task"],
            parameters["data"],
            parameters["seed"],
            parameters["task"],
            ReportProgress(work.pool, work.node.fingerprint),
        )
        notes = {"contribution": record.id} if record else {}
        return Output(metrics={"heldout": accuracy}, notes=notes)

    def _fit_and_push(
        self,
        repository: Repository,
        number: int,
        task: str,
        data: Mapping[str, Any],
        seed: int,
        contributor: str,
        *callbacks: lightning.Callback,
    ) -> tuple[Contribution | None, dict[str, float]]:
        """Fine-tune a base on a task in this process (one of the ranks); rank 0 pushes."""
        base, weights = repository.pull(number)
        one = member(self.settings, data, weights, seed=seed)
        one.probe()
        told = {"round": number + 1, "contributor": contributor, "task": task, "seed": seed}
        identity = fingerprint({**told, "repository": repository.place.url, "base": base.hash})
        title = " ".join(dict.fromkeys([f"round {number + 1}:", contributor, task]))
        with member_run(one.settings, identity, title, told) as logger:
            one.fit(callbacks, logger)
            accuracy = one.accuracy(one.splits.heldout)
            numbers = {f"heldout/{name}": value for name, value in accuracy.items() if name != "count"}
            summarise(logger, {"round": number + 1, **numbers})
        if not is_first_process():
            return None, accuracy
        note = {"task": task, "examples": len(one.splits.train), "heldout_accuracy": accuracy["accuracy"]}
        return repository.push(one.body(), base, contributor, note), accuracy

    def _fuse(self, work: Work) -> Output:
        repository, number, _ = self._start(work)
        wanted = [work.record(index).notes["contribution"] for index in range(1, len(work.node.inputs))]
        record = repository.fuse(only=wanted, score=self._score(), fuser="synchronous round")
        if record is None:
            # A killed driver may have made the round and not noted it; the log has it then, with these contributions.
            rounds = repository.rounds()
            found = rounds[number] if len(rounds) > number else None
            if found is None or {verdict.id for verdict in found.verdicts} != set(wanted):
                raise StorageError(
                    f"Round {number + 1} of {repository.place.url} cannot be made: no contribution passed the screening, or "
                    f"the repository has another round. `soups cold log {repository.place.url}` shows what there is."
                )
            record = found
        return Output(notes=_round_notes(work, record))

    def _score(self) -> Callable[[Weights], float] | None:
        """Return what the held-out check compares: mean held-out accuracy of linear probes on a body; None without a check."""
        if not self.study.checked:
            return None

        def score(body: Weights) -> float:
            name = hash_weights(body)
            if name not in self._scores:  # asynchronous fusers look at what waits again and again
                found = [heldout_accuracy(member(self.settings, data, body)) for data in self.study.checked.values()]
                self._scores[name] = sum(found) / len(found)
            return self._scores[name]

        return score

    def _contributor(self, work: Work) -> Output:
        """Come, fine-tune and push again and again, fuse when there is enough, and go when all rounds are there."""
        repository, _, _ = self._start(work)
        parameters, pushed = work.parameters, 0
        name = f"contributor {parameters['number']}"
        tasks = list(parameters["tasks"])
        turn = sum(record.contributor == name for record in repository.pushed())
        while True:
            while repository.fuse(score=self._score(), fuser=name):
                pass
            base = repository.current()
            if base.number >= parameters["rounds"]:
                return Output(notes={"pushed": pushed})
            task = tasks[(parameters["number"] + turn) % len(tasks)]
            seed = derive_seed(parameters["seed"], name, turn) % 2**31
            if device_count(self.settings) > 1 and not launched_outside():
                message = ContributionMessage(
                    settings=self.settings, base=base.number, task=task, seed=seed, contributor=name
                )
                run_in_processes(contribute_in_ranks, message, reuse=processes(self.settings))
            else:
                self._fit_and_push(repository, base.number, task, parameters["tasks"][task], seed, name)
            turn, pushed = turn + 1, pushed + 1

    def contribute(self, message: ContributionMessage) -> None:
        """Make one contribution to the main repository in this process, one of the ranks of its training."""
        data = self.study.seen[message.task]
        self._fit_and_push(self.repository("main"), message.base, message.task, data, message.seed, message.contributor)

    def _base(self, work: Work) -> Output:
        repository, _, _ = self._start(work)
        number, rounds = work.parameters["round"], repository.rounds()
        while len(rounds) < number and repository.fuse(score=self._score(), fuser="driver"):
            rounds = repository.rounds()
        if len(rounds) < number:
            raise StorageError(
                f"The contributors left after {len(rounds)} rounds; {number} were wanted. The same command goes on from there."
            )
        return Output(notes=_round_notes(work, rounds[number - 1]))

    def _multitask(self, work: Work) -> Output:
        """Train one body on all tasks at once, each sample's loss over its own task's classes."""
        parameters = work.parameters
        repository, number, _ = self._start(work)
        _, weights = repository.pull(number)
        parts = [member(self.settings, data).splits for data in parameters["data"].values()]
        joint, groups = pooled(parts)
        one = self._pooled_member(joint, groups, weights, parameters)
        one.probe()
        with node_run(one.settings, work) as logger:
            one.fit([ReportProgress(work.pool, work.node.fingerprint)], logger)
        body = one.body()
        return Output(
            {name: body[name] for name in body}, notes={"weights": hash_weights(body), "examples": len(joint.train)}
        )

    def _pooled_member(
        self, joint: Splits, groups: Sequence[int], weights: Mapping[str, torch.Tensor], parameters: Mapping[str, Any]
    ) -> Member:
        trainer = {**self.settings["trainer"], "max_epochs": parameters["epochs"]}
        task = {**self.settings["task"], "class_groups": list(groups)}
        first = next(iter(parameters["data"].values()))
        return member(self.settings, first, weights, joint, trainer=trainer, task=task, seed=parameters["seed"])

    def _judged(self, work: Work) -> Member:
        """Return the first input's body on the node's task."""
        notes = work.record(0).notes
        weights = work.tensors(0) if "repository" not in notes else self._weights(work)
        seed = work.parameters.get("seed", 0)
        return member(self.settings, work.parameters["data"], weights, seed=seed)

    def _weights(self, work: Work) -> dict[str, torch.Tensor]:
        repository, number, _ = self._start(work)
        return repository.pull(number)[1]

    def _probe(self, work: Work) -> Output:
        one = self._judged(work)
        found, classes = features(one), len(one.splits.classes)
        shots = work.parameters["shots"]
        return Output(
            metrics={"frozen": found.probe(classes), "few": found.probe(classes, shots, work.parameters["seed"])},
            notes={"split": one.splits.hash()},
        )

    def _fine_tune(self, work: Work) -> Output:
        one = self._judged(work)
        one.probe()
        one.fit([ReportProgress(work.pool, work.node.fingerprint)])
        return Output(metrics={"fine-tuned": one.accuracy(one.splits.test)}, notes={"split": one.splits.hash()})

    # Report

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report: curves over rounds, the table of all models, and what the repository logged."""
        study, nodes = self.study, self.layout()
        tasks = {"seen": list(study.seen), "unseen": list(study.unseen)}

        def mean(found: Mapping[tuple[str, str], Node], model: str, group: str, split: str) -> float | None:
            values = [
                100 * pool.ingredient(found[model, task].fingerprint).metrics[split]["accuracy"]
                for task in tasks[group]
                if (model, task) in found
            ]
            return sum(values) / len(values) if values else None

        order = ["pretrained", *(f"round {number}" for number in range(1, study.rounds + 1))]
        curves = {
            f"{group}, {label}": [mean(nodes.probes, model, group, split) for model in order]
            for group in tasks
            if tasks[group]
            for split, label in (("frozen", "linear probe"), ("few", f"{study.shots}-shot probe"))
        }
        for group in tasks:
            if tasks[group]:
                curves[f"{group}, fine-tuned"] = [mean(nodes.fine_tuned, model, group, "fine-tuned") for model in order]
        columns = ["model"]
        rows: list[list[Any]] = [[model] for model in nodes.models]
        for group in tasks:
            for found, split, label in (
                (nodes.probes, "frozen", "probe"), (nodes.probes, "few", f"{study.shots}-shot"),
                (nodes.fine_tuned, "fine-tuned", "fine-tuned"),
            ):  # fmt: skip
                if tasks[group]:
                    columns.append(f"{group} {label}, %")
                    for row, model in zip(rows, nodes.models, strict=True):
                        row.append(mean(found, model, group, split))
        each = Table(
            title="Linear probe by task",
            columns=["model", *(f"{task}, %" for group in tasks.values() for task in group)],
            rows=[
                [model, *(100 * pool.ingredient(nodes.probes[model, task].fingerprint).metrics["frozen"]["accuracy"]
                          for group in tasks.values() for task in group)]
                for model in nodes.models
            ],
        )  # fmt: skip
        parts: list[Part] = [
            Table(title="ColD Fusion: test accuracy", columns=columns, rows=rows, highlight=[rows.index(row) for row in rows if row[0] == order[-1]],
                  note="Means over tasks. Fine-tuned: not all rounds."),
            Curves(title="Accuracy by round", x_label="round", y_label="test accuracy, %",
                   x=[float(number) for number in range(len(order))], series=curves),
            each,
            self._log(),
        ]  # fmt: skip
        first, last = (mean(nodes.probes, model, "seen", "frozen") for model in (order[0], order[-1]))
        assert first is not None
        assert last is not None
        return Page(
            title="ColD Fusion",
            subject="protocol",
            summary=(
                f"After {study.rounds} {study.mode} rounds the base's linear probes on the {len(tasks['seen'])} seen tasks are "
                f"right on {last:.1f} % of the test texts, pretrained {first:.1f} %."
            ),
            parts=parts,
            lineage={
                "repository": self.url,
                "bases": [base.hash for base in self.repository("main").bases()],
            },
        )

    def _log(self) -> Table:
        rows: list[list[Any]] = []
        for record in self.repository("main").rounds():
            for verdict in record.verdicts:
                rows.append(
                    [
                        record.number,
                        verdict.contributor,
                        verdict.started,
                        verdict.norm,
                        "fused" if verdict.accepted else verdict.reason,
                    ]
                )
        return Table(
            title="Contributions", columns=["round", "contributor", "from base", "update norm", "outcome"], rows=rows
        )


def _round_notes(work: Work, record: Round) -> dict[str, Any]:
    return {
        "repository": work.record(0).notes["repository"],
        "base": record.result,
        "number": record.number,
        "accepted": len(record.accepted),
        "refused": {verdict.contributor: verdict.reason for verdict in record.verdicts if not verdict.accepted},
    }


def _heldout_check(rules: Any, tasks: Sequence[str]) -> tuple[float, list[str]]:
    """Return tolerance and tasks of a held-out check.

    Raises:
        ConfigError: naming the key.
    """
    if not isinstance(rules, Mapping) or "tolerance" not in rules:
        raise ConfigError(f"protocol.policy.heldout={rules} must say how far a score may fall: {{tolerance: 0.02}}.")
    if unknown := sorted(set(rules) - {"tolerance", "tasks"}):
        raise ConfigError(
            f"protocol.policy.heldout.{unknown[0]} is unknown: {did_you_mean(unknown[0], ['tolerance', 'tasks'])}"
        )
    tolerance, named = rules["tolerance"], rules.get("tasks")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance <= 1:
        raise ConfigError(f"protocol.policy.heldout.tolerance={tolerance} must be an accuracy between 0 and 1.")
    chosen = list(tasks) if named is None else [str(name) for name in named]
    for name in chosen:
        if name not in tasks:
            raise ConfigError(
                f"protocol.policy.heldout.tasks: {name!r} is none of protocol.tasks; {did_you_mean(name, tasks)}"
            )
    if not chosen:
        raise ConfigError("protocol.policy.heldout.tasks is empty; leave it out for all tasks.")
    return float(tolerance), chosen
