"""`+protocol=warm`: reward models from real ratings, and their weight average."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation import predict, score
from soups.fitting import FitSpec
from soups.fitting.environment import device_for
from soups.fitting.schema import Target
from soups.fitting.spec import Task
from soups.fitting.task import build_splits
from soups.fitting.tracking import summarise
from soups.fitting.training import train
from soups.protocols.execution import Operation, Output, Work
from soups.protocols.fits import batches_of, network_of, node_run, report_progress, trained_weights
from soups.protocols.plan import Plan
from soups.protocols.runner import FittingConfiguration, ProtocolRunner
from soups.protocols.warm.average import best_first
from soups.protocols.warm.features import PROBABILITIES, layerwise
from soups.protocols.warm.page import RatedTexts, warm_page
from soups.protocols.warm.plan import (
    AverageNotes,
    AverageParameters,
    ControlParameters,
    FeatureNotes,
    FeatureParameters,
    HeadParameters,
    MemberParameters,
    RewardParameters,
    TrajectoryParameters,
    WarmNodes,
    WarmSettings,
    warm_nodes,
)
from soups.reporting.page import Page
from soups.stores import write_safetensors
from soups.stores.files import replacing_folder
from soups.stores.pool import Pool
from soups.tasks.data import Samples, Splits
from soups.tasks.network import Network
from soups.tasks.preferences import Pairs, RewardInput, parts
from soups.tasks.probe import linear_probe
from soups.tasks.texts import Texts
from soups.weights import RunningSum, Weights

# Of `data`: each fit has its own.
OWN = ("swapped", "part")


class WarmConfiguration(FittingConfiguration):
    """All settings of the protocol; `data` are the preferences."""

    data: Target
    task: Task
    protocol: WarmSettings


class Warm(ProtocolRunner[WarmConfiguration]):
    """The protocol of `conf/protocol/warm.yaml`.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "warm"
    Configuration = WarmConfiguration

    def __init__(self, configuration: WarmConfiguration) -> None:
        super().__init__(configuration)
        data = configuration.data
        if not str(data.get("_target_")).endswith(".preferences"):
            raise ConfigError(
                "protocol=warm judges by ratings: use data=preferences. For files see soups.protocols.warm."
            )
        if given := [key for key in OWN if data.get(key) is not None]:
            raise ConfigError(
                f"data.{given[0]} does nothing with +protocol=warm: every fit has its own. Leave it out; for swapped labels set "
                f"protocol.study.swapped."
            )
        self.data = {key: value for key, value in data.items() if key not in OWN}
        self.layout, self.base = configuration.layout, configuration.fit(self.data)
        self.nodes: WarmNodes = warm_nodes(configuration.protocol, self.base, configuration.seed)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.nodes.plan()

    @property
    def shown(self) -> dict[str, Any]:
        """Settings that decide the report alone."""
        return {"sizes": self.configuration.protocol.sizes}

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
        return {
            "trajectory": self._trajectory,
            "head": self._head,
            "member": self._member,
            "control": self._control,
            "warm": _warm,
            "rewards": self._rewards,
            "features": _features,
        }

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        return warm_page(
            self.nodes, self.configuration.protocol, pool, self.texts(), float(self.data["gap"]), self._training_pairs
        )

    def _training_pairs(self, data: Mapping[str, Any]) -> Pairs:
        pairs = build_splits(dict(data)).train
        assert isinstance(pairs, Pairs)
        return pairs

    def _network(self, spec: FitSpec) -> Network:
        return network_of(spec, 2, seed=self.configuration.seed)

    def _start(self, spec: FitSpec, changes: Weights) -> dict[str, Tensor]:
        """Return the pretrained weights with some of them replaced."""
        network = self._network(spec)
        network.module.load_state_dict(dict(changes), strict=False)
        return {name: tensor.detach().clone() for name, tensor in network.module.state_dict().items()}

    def _fit(
        self, work: Work, spec: FitSpec, splits: Splits, start: dict[str, Tensor], *more: lightning.Callback
    ) -> Output:
        with node_run(self.configuration, work) as logger:
            network, trainer = train(spec, self.layout, start, splits, [report_progress(work), *more], logger)
            device = trainer.strategy.root_device
            logits = predict(network.module.to(device), batches_of(spec, self.layout, splits.heldout, network), device)
            numbers = score(logits, splits.heldout.labels)
            found = {"accuracy": numbers.accuracy, "loss": numbers.loss}
            summarise(logger, {f"heldout/{name}": value for name, value in found.items()})
        return Output(trained_weights(network.module), {"heldout": found})

    def _probe(self, spec: FitSpec, splits: Splits, weights: Weights) -> dict[str, Tensor]:
        """Return the head that fits best on frozen features."""
        network = self._network(spec)
        network.module.load_state_dict(dict(weights), strict=False)
        batches = [batches_of(spec, self.layout, samples, network) for samples in (splits.train, splits.heldout)]
        linear_probe(network, batches[0], batches[1], 2, device_for(self.layout.devices))
        trained = trained_weights(network.module)
        return {name: value for name, value in trained.items() if name.startswith(f"{network.head}.")}

    def _trajectory(self, work: Work) -> Output:
        """Fine-tune from the linear probe with a constant rate, and keep points on the way."""
        parameters = work.read(TrajectoryParameters)
        splits = build_splits(parameters.fit.data)
        keep = KeepPoints(parameters.points)
        head = self._probe(parameters.fit, splits, {})
        output = self._fit(work, parameters.fit, splits, self._start(parameters.fit, head), keep)
        tensors = {
            f"{number}/{name}": value for number, point in enumerate(keep.points) for name, value in point.items()
        }
        return Output(tensors, output.metrics)

    def _head(self, work: Work) -> Output:
        """Fit the head that all members share, on the features of the trajectory's end."""
        parameters = work.read(HeadParameters)
        spec = self.base.with_(data=parameters.data, model=parameters.model)
        points = self.configuration.protocol.study.points
        encoder = _point(work.tensors("trajectory"), points - 1) if work.node.inputs else {}
        return Output(self._probe(spec, build_splits(spec.data), encoder))

    def _member(self, work: Work) -> Output:
        """Fine-tune from a point of the trajectory with the shared head."""
        parameters = work.read(MemberParameters)
        encoder = {} if parameters.point is None else _point(work.tensors("trajectory"), parameters.point)
        start = self._start(parameters.fit, {**encoder, **work.tensors("head")})
        return self._fit(work, parameters.fit, build_splits(parameters.fit.data), start)

    def _control(self, work: Work) -> Output:
        """Fine-tune another reward model, on texts and labels that the members do not have."""
        spec = work.read(ControlParameters).fit
        splits = build_splits(spec.data)
        return self._fit(work, spec, splits, self._start(spec, self._probe(spec, splits, {})))

    def _rewards(self, work: Work) -> Output:
        """Give every text its reward."""
        parameters = work.read(RewardParameters)
        spec = self.base.with_(data=parameters.data, model=parameters.model)
        network = self._network(spec)
        network.module.load_state_dict(work.tensors("model"), strict=False)
        device = device_for(self.layout.devices)
        module = network.module.to(device)

        def rewards(samples: Samples) -> Tensor:
            return predict(module, batches_of(spec, self.layout, samples, network), device)

        tensors = {
            f"texts/{name}": rewards(Texts(rated.texts, [0] * len(rated.texts)))[:, 0].contiguous()
            for name, rated in self.texts().items()
        }
        splits = build_splits(spec.data)
        heldout = score(rewards(splits.heldout), splits.heldout.labels)
        return Output(
            {**tensors, "pairs": rewards(splits.train)},
            {"heldout": {"accuracy": heldout.accuracy, "loss": heldout.loss}},
        )

    def texts(self) -> dict[str, RatedTexts]:
        """Return the texts that are scored, by split: those of the test part, and of other domains."""
        data, own = self.data, self.configuration.protocol
        found: dict[str, RatedTexts] = {}
        for name, domain, size in (
            ("test", data["domain"], own.candidates),
            *((name, name, own.ood_texts) for name in data["ood"] if name != data["domain"]),
        ):
            rated = parts(domain, int(data["split_seed"]))["test"][:size]
            if len(rated) < size:
                raise ConfigError(f"{domain} has only {len(rated)} test texts, fewer than the {size} asked for.")
            rated = sorted(rated, key=lambda one: len(one.text))  # of like lengths: batches pad little
            found[name] = RatedTexts([one.text for one in rated], torch.tensor([one.mean for one in rated]))
        return found

    def export(self, plan: Plan, pool: Pool, folder: Path) -> None:
        """Write the averages as folders that transformers and TRL load."""
        for group in self.nodes.groups:
            place = folder / f"reward_model_{round(100 * group.share)}"
            if place.is_dir():
                continue
            network = self._network(self.base.with_(data=dict(group.data)))
            network.module.load_state_dict(pool.weights(group.warm.fingerprint), strict=False)
            save_reward_model(network, place)


def save_reward_model(network: Network, folder: Path) -> None:
    """Write a reward model and its tokenizer as a Hugging Face folder, whole or not at all.

    `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads it, as TRL's trainers do.
    """
    module: Any = network.module
    assert isinstance(network.input, RewardInput)
    with replacing_folder(folder) as scratch:
        module.config.save_pretrained(scratch)
        network.input.texts.tokenizer.save_pretrained(scratch)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        write_safetensors(scratch / "model.safetensors", weights, {"format": "pt"})


class KeepPoints(lightning.Callback):
    """Copy the trained weights at `count` equally spaced steps, the last one included.

    Attributes:
        points: the copies, in order.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.points: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy at the steps that are due."""
        total = int(trainer.estimated_stepping_batches)
        due = [round(total * (number + 1) / self.count) for number in range(self.count)]
        if trainer.global_step in due[len(self.points) :]:
            model: Any = pl_module.model
            self.points.append(trained_weights(model))


def _point(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{number}/")}


def _warm(work: Work) -> Output:
    """Average the best members."""
    members = work.node.inputs_of("members")
    accuracies = [record.heldout() for record in work.records("members")]
    best = best_first(accuracies, work.read(AverageParameters).keep)
    total = RunningSum()
    for number in sorted(best):
        total.add(work.pool.weights(members[number].fingerprint), where=members[number].label)
    return Output(total.mean(), notes=AverageNotes(members=[members[number].fingerprint for number in best]))


def _features(work: Work) -> Output:
    """Measure the weight of features in averages of networks of some depths."""
    parameters = work.read(FeatureParameters)
    measured = {str(depth): layerwise(depth, PROBABILITIES, seed=parameters.seed) for depth in parameters.layers}
    return Output(notes=FeatureNotes(layers=measured, probabilities=list(PROBABILITIES)))
