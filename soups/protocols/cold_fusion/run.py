"""`+protocol=cold_fusion`: contributors on real tasks, a repository between them, and the quality of its bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import lightning.pytorch as lightning
from pydantic import Field
from torch import Tensor

from soups.errors import StorageError
from soups.fitting import FitSpec
from soups.fitting.environment import is_first_process, kind_of_processes, needs_processes
from soups.fitting.quiet import quiet
from soups.fitting.tracking import summarise
from soups.protocols.backbones import TaskModel, backbone_of, frozen_names, heldout_accuracy
from soups.protocols.cold_fusion.page import cold_fusion_page
from soups.protocols.cold_fusion.plan import (
    ColdFusionNodes,
    ContributeParameters,
    ContributorParameters,
    FineTuneParameters,
    FuseParameters,
    InitParameters,
    MultitaskParameters,
    ProbeParameters,
    cold_fusion_nodes,
)
from soups.protocols.cold_fusion.records import Contribution, Round
from soups.protocols.cold_fusion.repository import Repository
from soups.protocols.cold_fusion.settings import ColdFusionConfiguration
from soups.protocols.execution import Notes, Operation, Output, Work
from soups.protocols.fits import fit_run, network_of, node_run, report_progress
from soups.protocols.plan import Plan
from soups.protocols.runner import ProtocolRunner
from soups.reporting.page import Page
from soups.seeding import derive_seed
from soups.stores.files import fingerprint
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.pooled import pooled
from soups.weights import Weights, hash_weights
from soups.worker import Message, run_in_processes


class BaseNotes(Notes):
    """Where a base is: the repository's name, the base's number and hash; what its round accepted, and why it refused."""

    repository: str
    base: str
    number: int
    accepted: int = 0
    refused: dict[str, str] = Field(default_factory=dict[str, str])


class ContributionNotes(Notes):
    """The id of a pushed contribution."""

    contribution: str


class ContributorNotes(Notes):
    """How many contributions a contributor pushed."""

    pushed: int


class SplitNotes(Notes):
    """Hash of the data that a base was judged on."""

    split: str


class MultitaskNotes(Notes):
    """Hash of the backbone, and how many samples it was trained on."""

    weights: str
    examples: int


class ContributionMessage(Message):
    """A contribution to the main repository, for the processes that train it.

    Attributes:
        configuration: all settings.
        base: number of the base to start from.
        task: name of the task.
        seed: of the fit.
        contributor: who pushes.
    """

    configuration: ColdFusionConfiguration
    base: int
    task: str
    seed: int
    contributor: str


def contribute_in_ranks(message: ContributionMessage) -> None:
    """Make one contribution in this process, one of the ranks of its training."""
    quiet()
    program = ColdFusion(message.configuration)
    spec = program.study.seen[message.task].with_(seed=message.seed)
    program.fit_and_push(program.repository("main"), message.base, message.task, spec, message.contributor)


class ColdFusion(ProtocolRunner[ColdFusionConfiguration]):
    """The protocol of `conf/protocol/cold_fusion.yaml`.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "cold_fusion"
    Configuration = ColdFusionConfiguration

    def __init__(self, configuration: ColdFusionConfiguration) -> None:
        super().__init__(configuration)
        self.layout, self.study = configuration.layout, configuration.study()
        self.url = configuration.protocol.repository or f"{configuration.pool.path}/repository"
        self._scores: dict[str, float] = {}
        self.study.check()

    @cached_property
    def nodes(self) -> ColdFusionNodes:
        """The plan's nodes."""
        return cold_fusion_nodes(self.study)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.nodes.plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
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

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report: curves over rounds, the table of all models, and the repository's log."""
        return cold_fusion_page(self.study, self.nodes, pool, self.repository("main"))

    def repository(self, name: str) -> Repository:
        """Open one of the study's repositories."""
        return Repository(f"{self.url}/{name}")

    def _model(self, spec: FitSpec, backbone: Weights, splits: Splits | None = None) -> TaskModel:
        return TaskModel.build(spec, self.layout, backbone, splits, seed=self.configuration.seed)

    def _init(self, work: Work) -> Output:
        parameters = work.read(InitParameters)
        network = network_of(next(iter(self.study.seen.values())), 2, seed=self.configuration.seed)
        repository = Repository.create(
            f"{self.url}/{parameters.repository}",
            backbone_of(network),
            parameters.policy,
            frozen=frozen_names(network),
        )
        return Output(notes=BaseNotes(repository=parameters.repository, base=repository.manifest.base, number=0))

    def _start(self, work: Work, role: str = "base") -> tuple[Repository, BaseNotes]:
        """Return the repository and the base that an input left in it."""
        notes = work.notes(role, BaseNotes)
        repository = self.repository(notes.repository)
        if not any(base.hash == notes.base and base.number == notes.number for base in repository.bases()):
            raise StorageError(
                f"The pool knows base {notes.number} ({notes.base[:12]}), but the repository {repository.folder.url} has "
                f"another or none. Use the repository that goes with the pool, or another pool (pool.path=…) for a new one."
            )
        return repository, notes

    def _contribute(self, work: Work) -> Output:
        repository, base = self._start(work)
        parameters = work.read(ContributeParameters)
        record, accuracy = self.fit_and_push(
            repository, base.number, parameters.task, parameters.fit, parameters.task, report_progress(work)
        )
        notes = ContributionNotes(contribution=record.id) if record else {}
        return Output(metrics={"heldout": accuracy}, notes=notes)

    def fit_and_push(
        self,
        repository: Repository,
        number: int,
        task: str,
        spec: FitSpec,
        contributor: str,
        *callbacks: lightning.Callback,
    ) -> tuple[Contribution | None, dict[str, float]]:
        """Fine-tune a base on a task in this process, one of the ranks; rank 0 pushes.

        Args:
            repository: has the base.
            number: of the base.
            task: its name.
            spec: its fit.
            contributor: who pushes.
            callbacks: of the fit, besides those of `spec`.

        Returns:
            The contribution (None in further ranks), and its held-out metrics.
        """
        base, weights = repository.pull(number)
        model = self._model(spec, weights)
        model.probe()
        about = {"round": number + 1, "contributor": contributor, "task": task, "seed": spec.seed}
        identity = fingerprint({**about, "repository": repository.folder.url, "base": base.hash})
        title = " ".join(dict.fromkeys([f"round {number + 1}:", contributor, task]))
        with fit_run(self.configuration, identity, title, about) as logger:
            model.fit(callbacks, logger)
            accuracy = model.accuracy(model.splits.heldout)
            numbers = {f"heldout/{name}": value for name, value in accuracy.items() if name != "count"}
            summarise(logger, {"round": number + 1, **numbers})
        if not is_first_process():
            return None, accuracy
        note = {"task": task, "examples": len(model.splits.train), "heldout_accuracy": accuracy["accuracy"]}
        return repository.push(model.backbone(), base, contributor, note), accuracy

    def _fuse(self, work: Work) -> Output:
        repository, base = self._start(work)
        wanted = [work.notes_of(node, ContributionNotes).contribution for node in work.node.inputs_of("contributions")]
        record = repository.fuse(only=wanted, score=self._score(), fuser="synchronous round")
        if record is None:
            # A killed driver may have made the round and not noted it; the log has it then, with these contributions.
            rounds = repository.rounds()
            found = rounds[base.number] if len(rounds) > base.number else None
            if found is None or {verdict.id for verdict in found.verdicts} != set(wanted):
                raise StorageError(
                    f"Round {base.number + 1} of {repository.folder.url} cannot be made: no contribution passed the screening, "
                    f"or the repository has another round. `soups cold log {repository.folder.url}` shows its log."
                )
            record = found
        return Output(notes=_round_notes(base.repository, record))

    def _score(self) -> Callable[[Weights], float] | None:
        """Return the score of the held-out check: mean held-out accuracy of linear probes on a backbone; None without one."""
        if not self.study.checked:
            return None

        def score(backbone: Weights) -> float:
            name = hash_weights(backbone)
            if name not in self._scores:  # asynchronous fusers look at waiting contributions again and again
                specs = [self.study.seen[task] for task in self.study.checked]
                found = [heldout_accuracy(self._model(spec, backbone)) for spec in specs]
                self._scores[name] = sum(found) / len(found)
            return self._scores[name]

        return score

    def _contributor(self, work: Work) -> Output:
        """Come, fine-tune and push again and again, fuse when there is enough, and go when all rounds are there."""
        repository, _ = self._start(work)
        parameters, pushed = work.read(ContributorParameters), 0
        name, tasks = f"contributor {parameters.number}", list(parameters.fits)
        turn = sum(record.contributor == name for record in repository.pushed())
        while True:
            while repository.fuse(score=self._score(), fuser=name):
                pass
            base = repository.current()
            if base.number >= parameters.rounds:
                return Output(notes=ContributorNotes(pushed=pushed))
            task = tasks[(parameters.number + turn) % len(tasks)]
            seed = derive_seed(parameters.seed, name, turn) % 2**31
            if needs_processes(self.configuration.devices):
                message = ContributionMessage(
                    configuration=self.configuration, base=base.number, task=task, seed=seed, contributor=name
                )
                run_in_processes(contribute_in_ranks, message, reuse=kind_of_processes(self.configuration.devices))
            else:
                spec = parameters.fits[task].with_(seed=seed)
                self.fit_and_push(repository, base.number, task, spec, name)
            turn, pushed = turn + 1, pushed + 1

    def _base(self, work: Work) -> Output:
        repository, base = self._start(work)
        number, rounds = work.read(FuseParameters).round, repository.rounds()
        while len(rounds) < number and repository.fuse(score=self._score(), fuser="driver"):
            rounds = repository.rounds()
        if len(rounds) < number:
            raise StorageError(
                f"The contributors left after {len(rounds)} rounds; {number} were wanted. The same command goes on from there."
            )
        return Output(notes=_round_notes(base.repository, rounds[number - 1]))

    def _multitask(self, work: Work) -> Output:
        """Train one backbone on all tasks at once, each sample's loss over its own task's classes."""
        parameters = work.read(MultitaskParameters)
        repository, base = self._start(work)
        _, weights = repository.pull(base.number)
        parts = [self._model(spec, weights).splits for spec in parameters.fits.values()]
        joint, groups = pooled(parts)
        spec = next(iter(parameters.fits.values()))
        spec = spec.with_(seed=parameters.seed, trainer={"max_epochs": parameters.epochs})
        model = self._model(spec, weights, joint)
        model.class_groups = groups
        model.probe()
        with node_run(self.configuration, work) as logger:
            model.fit([report_progress(work)], logger)
        backbone = model.backbone()
        return Output(backbone, notes=MultitaskNotes(weights=hash_weights(backbone), examples=len(joint.train)))

    def _judged(self, work: Work, spec: FitSpec) -> TaskModel:
        """Return the judged backbone on a task."""
        return self._model(spec, self._backbone(work))

    def _backbone(self, work: Work) -> dict[str, Tensor]:
        if work.input("model").operation == "cold.multitask":
            return work.tensors("model")
        repository, base = self._start(work, "model")
        return repository.pull(base.number)[1]

    def _probe(self, work: Work) -> Output:
        parameters = work.read(ProbeParameters)
        model = self._judged(work, self.configuration.fit(parameters.data))
        found = model.features()
        return Output(
            metrics={"frozen": found.probe(), "few": found.probe(parameters.shots, parameters.seed)},
            notes=SplitNotes(split=model.splits.hash()),
        )

    def _fine_tune(self, work: Work) -> Output:
        spec = work.read(FineTuneParameters).fit
        model = self._judged(work, spec)
        model.probe()
        model.fit([report_progress(work)])
        accuracy = model.accuracy(model.splits.test)
        return Output(metrics={"fine-tuned": accuracy}, notes=SplitNotes(split=model.splits.hash()))


def _round_notes(repository: str, record: Round) -> BaseNotes:
    return BaseNotes(
        repository=repository,
        base=record.result,
        number=record.number,
        accepted=len(record.accepted),
        refused={verdict.contributor: verdict.reason for verdict in record.verdicts if not verdict.accepted},
    )
