"""`+protocol=fusing`, `ratatouille`, `lo_fi`: the operations of their nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch

from soups.errors import DataError
from soups.fitting import FitSpec
from soups.fitting.schema import Section, Target
from soups.fitting.spec import Augment, Task
from soups.protocols.backbones import TaskModel, load_backbone
from soups.protocols.execution import Operation, Output, Work
from soups.protocols.fits import node_run, report_progress
from soups.protocols.plan import Plan
from soups.protocols.recycling.fusing import fusing
from soups.protocols.recycling.lo_fi import lo_fi
from soups.protocols.recycling.page import comparison_page
from soups.protocols.recycling.plan import BackboneFit, HeadProbe, ModelComparison, Scoring, TargetFit, TargetTask
from soups.protocols.recycling.ratatouille import ratatouille
from soups.protocols.runner import FittingConfiguration, ProtocolRunner
from soups.reporting.page import Page
from soups.seeding import generator
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.texts import Texts
from soups.weights import RunningSum, check_same


class AuxiliarySettings(Section):
    """The section `protocol` of fusing and Model Ratatouille.

    Attributes:
        auxiliary: `data` sections of the auxiliary tasks, by name; null takes one out.
    """

    auxiliary: dict[str, Target | None]


class LoFiSettings(Section):
    """The section `protocol` of lo-fi.

    Attributes:
        nodes: how many fine-tune without communication.
    """

    nodes: int


class TargetConfiguration(FittingConfiguration):
    """Settings with a target task, `data`."""

    data: Target
    task: Task
    augment: Augment | None = None


class AuxiliaryConfiguration(TargetConfiguration):
    """Settings of fusing and Model Ratatouille."""

    protocol: AuxiliarySettings

    def auxiliary_fits(self) -> dict[str, FitSpec]:
        """Return the fits on the auxiliary tasks, by name."""
        return {name: self.fit(data) for name, data in self.protocol.auxiliary.items() if data is not None}


class LoFiConfiguration(TargetConfiguration):
    """Settings of lo-fi."""

    protocol: LoFiSettings


T = TypeVar("T", bound=TargetConfiguration)


class Recycling(ProtocolRunner[T]):
    """A protocol for one target task.

    Attributes:
        title: of the report.
        question: the models whose difference the summary states, the first minus the second.
    """

    title: ClassVar[str]
    question: ClassVar[tuple[str, str]]

    def __init__(self, configuration: T) -> None:
        super().__init__(configuration)
        self.layout = configuration.layout
        self.target = TargetTask(configuration.fit(configuration.data))
        self.comparison = self.compared()

    @abstractmethod
    def compared(self) -> ModelComparison:
        """Return the models of the study."""

    def plan(self) -> Plan:
        """Return the plan."""
        return self.comparison.plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
        return {
            "backbone.fit": self._backbone,
            "backbone.mean": _mean,
            "target.start": self._start,
            "target.fit": self._fit,
            "target.mean": _mean,
            "target.score": self._score,
        }

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report: the table of all models, and held-out against OOD accuracy."""
        return comparison_page(self.comparison, pool, self.title, self.question)

    def _backbone(self, work: Work) -> Output:
        model = TaskModel.build(work.read(BackboneFit).fit, self.layout, seed=self.configuration.seed)
        model.probe()
        with node_run(self.configuration, work) as logger:
            model.fit([report_progress(work)], logger)
        return Output(model.backbone(), {"heldout": model.accuracy(model.splits.heldout)})

    def _start(self, work: Work) -> Output:
        parameters = work.read(HeadProbe)
        spec = self.target.spec.with_(data=parameters.data, model=parameters.model)
        backbone = work.tensors("backbone") if work.node.inputs else None
        model = TaskModel.build(spec, self.layout, backbone, seed=self.configuration.seed)
        model.probe()
        return Output(model.weights(), {"heldout": model.accuracy(model.splits.heldout)})

    def _fit(self, work: Work) -> Output:
        parameters = work.read(TargetFit)
        model = self._loaded(work, "start", parameters.fit)
        if work.node.inputs_of("backbone"):
            load_backbone(model.network, work.tensors("backbone"))
        if parameters.shard:
            model.splits = shard(model.splits, *parameters.shard)
        with node_run(self.configuration, work) as logger:
            model.fit([report_progress(work)], logger)
        return Output(model.weights(), {"heldout": model.accuracy(model.splits.heldout)})

    def _score(self, work: Work) -> Output:
        parameters = work.read(Scoring)
        model = self._loaded(work, "model", self.target.spec.with_(data=parameters.data))
        splits = {"heldout": model.splits.heldout, **model.splits.reported()}
        return Output(metrics={name: model.accuracy(samples) for name, samples in splits.items()})

    def _loaded(self, work: Work, role: str, spec: FitSpec) -> TaskModel:
        """Return an input's model on the target, head included."""
        model = TaskModel.build(spec, self.layout, seed=self.configuration.seed, pretrained=False)
        weights = work.tensors(role)
        check_same(model.network.module.state_dict(), weights, where="the model")
        model.network.module.load_state_dict(weights)
        return model


class Fusing(Recycling[AuxiliaryConfiguration]):
    """Fusing (arXiv:2204.03044)."""

    name = "fusing"
    Configuration = AuxiliaryConfiguration
    title, question = "Fusing", ("from the fused backbone", "from pretrained")

    def compared(self) -> ModelComparison:
        """Return the models of the study."""
        return fusing(self.target, self.configuration.auxiliary_fits())


class Ratatouille(Recycling[AuxiliaryConfiguration]):
    """Model Ratatouille (arXiv:2212.10445)."""

    name = "ratatouille"
    Configuration = AuxiliaryConfiguration
    title, question = "Model Ratatouille", ("ratatouille", "uniform soup")

    def compared(self) -> ModelComparison:
        """Return the models of the study."""
        return ratatouille(self.target, self.configuration.auxiliary_fits())


class LoFi(Recycling[LoFiConfiguration]):
    """lo-fi (arXiv:2210.11948)."""

    name = "lo_fi"
    Configuration = LoFiConfiguration
    title, question = "lo-fi", ("lo-fi", "synchronous (DDP)")

    def compared(self) -> ModelComparison:
        """Return the models of the study."""
        return lo_fi(self.target, self.configuration.protocol.nodes)


def _mean(work: Work) -> Output:
    total = RunningSum()
    for node in work.node.inputs_of("models"):
        total.add(work.pool.weights(node.fingerprint), where=node.label)
    return Output(total.mean())


def shard(splits: Splits, number: int, count: int, seed: int = 0) -> Splits:
    """Return the splits with the number-th of `count` parts of the training split: disjoint, of equal size, by seed.

    Raises:
        DataError: the data are not texts, or too few.
    """
    train = splits.train
    if not isinstance(train, Texts) or len(train) < count:
        raise DataError(f"{len(train)} training samples cannot be shared out among {count} nodes, or are not texts.")
    order = torch.randperm(len(train), generator=generator(seed, "shard"))
    size = len(train) // count
    return Splits(
        train.take(order[number * size : (number + 1) * size]), splits.heldout, splits.test, splits.classes, splits.ood
    )
