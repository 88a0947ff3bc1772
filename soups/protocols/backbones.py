"""One backbone on many tasks, each with a head of its own.

The backbone is every tensor of the network but its head. Protocols average backbones; a linear probe fits a new head
wherever a backbone meets a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from torch import Tensor

from soups.evaluation import predict, score
from soups.fitting import FitSpec, Layout
from soups.fitting.environment import device_for
from soups.fitting.task import build_splits
from soups.fitting.training import train
from soups.protocols.fits import batches_of, network_of
from soups.seeding import generator
from soups.tasks.data import Samples, Splits
from soups.tasks.network import Network
from soups.tasks.probe import Probe, head_inputs, linear_probe
from soups.weights import Weights, check_same


@dataclass
class TaskModel:
    """A network on a task.

    Attributes:
        spec: its fit.
        layout: where it runs.
        splits: the task's data.
        network: the model; its head is as wide as the task has classes.
        class_groups: of pooled tasks, how many classes each has: a sample's loss is over its own task's classes.
    """

    spec: FitSpec
    layout: Layout
    splits: Splits
    network: Network
    class_groups: Sequence[int] = ()

    @staticmethod
    def build(
        spec: FitSpec,
        layout: Layout,
        backbone: Weights | None = None,
        splits: Splits | None = None,
        *,
        seed: int,
        pretrained: bool = True,
    ) -> TaskModel:
        """Build the network of a fit.

        Args:
            spec: names model and data.
            layout: where it runs.
            backbone: weights to start from; the pretrained ones when None.
            splits: the data, where they are built already.
            seed: of weights that are not pretrained.
            pretrained: false where the caller loads all weights.

        Raises:
            soups.errors.WeightsError: the backbone is another architecture's.
        """
        splits = splits or build_splits(spec.data)
        network = network_of(spec, len(splits.classes), seed=seed, pretrained=pretrained and backbone is None)
        if backbone is not None:
            load_backbone(network, backbone)
        return TaskModel(spec, layout, splits, network)

    def predictions(self, samples: Samples) -> Tensor:
        """Return logits (N, classes) on some samples."""
        device = device_for(self.layout.devices)
        return predict(self.network.module.to(device), self._batches(samples), device)

    def accuracy(self, samples: Samples) -> dict[str, float]:
        """Return accuracy in [0, 1], loss in nats and count on some samples."""
        numbers = score(self.predictions(samples), samples.labels)
        return {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}

    def probe(self) -> None:
        """Fit the head on the frozen backbone; the held-out split chooses its penalty."""
        batches = [self._batches(samples) for samples in (self.splits.train, self.splits.heldout)]
        linear_probe(self.network, batches[0], batches[1], len(self.splits.classes), device_for(self.layout.devices))

    def fit(self, callbacks: Sequence[lightning.Callback] = (), logger: Any | None = None) -> lightning.Trainer:
        """Train the network from where it is."""
        start = {name: tensor.detach().clone().cpu() for name, tensor in self.network.module.state_dict().items()}
        self.network, trainer = train(
            self.spec, self.layout, start, self.splits, callbacks, logger, class_groups=self.class_groups
        )
        return trainer

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, copied."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.module.state_dict().items()}

    def backbone(self) -> dict[str, Tensor]:
        """Return the weights without the head, copied."""
        return backbone_of(self.network)

    def features(self, names: Sequence[str] = ("train", "heldout", "test")) -> HeadInputs:
        """Run the frozen backbone over the splits, or some of them."""
        inputs: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        for name in names:
            batches = self._batches(getattr(self.splits, name))
            found, targets = head_inputs(self.network, batches, device_for(self.layout.devices))
            inputs[name], labels[name] = torch.from_numpy(found), torch.from_numpy(targets)
        return HeadInputs(inputs, labels, len(self.splits.classes))

    def _batches(self, samples: Samples) -> list[Any]:
        return batches_of(self.spec, self.layout, samples, self.network)


def backbone_of(network: Network) -> dict[str, Tensor]:
    """Return a network's weights without its head, copied."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in network.module.state_dict().items()
        if not name.startswith(f"{network.head}.")
    }


def load_backbone(network: Network, backbone: Weights) -> None:
    """Put a backbone into a network; its head stays.

    Raises:
        soups.errors.WeightsError: the backbone does not fit.
    """
    check_same(backbone_of(network), backbone, where="the backbone")
    network.module.load_state_dict(dict(backbone), strict=False)


def frozen_names(network: Network) -> list[str]:
    """Return the names of the parameters that are not trained."""
    return [name for name, parameter in network.module.named_parameters() if not parameter.requires_grad]


@dataclass(frozen=True)
class HeadInputs:
    """What enters the head of a frozen backbone, by split.

    Attributes:
        inputs: float32 (N, features).
        labels: int64 (N,).
        classes: how many there are.
    """

    inputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    classes: int

    def probe(self, shots: int | None = None, seed: int = 0) -> dict[str, float]:
        """Return the test accuracy in [0, 1] and loss in nats of a linear probe on all or on `shots` training samples."""
        chosen = None if shots is None else balanced_subset(self.labels["train"], shots, self.classes, seed)
        head, _ = self._fitted(chosen)
        with torch.inference_mode():
            numbers = score(head.module(self.inputs["test"]), self.labels["test"])
        return {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}

    def heldout_accuracy(self) -> float:
        """Return the held-out accuracy in [0, 1] of a linear probe; the held-out split chose its penalty."""
        return self._fitted()[1].heldout_accuracy

    def _fitted(self, chosen: Sequence[int] | None = None) -> tuple[Network, Probe]:
        """Return a head fitted to all or some training samples, and its score on the held-out split."""
        head = Network(torch.nn.Linear(self.inputs["train"].shape[1], self.classes), cast(Any, None), "")
        train_, heldout = ((self.inputs[split], self.labels[split]) for split in ("train", "heldout"))
        if chosen is not None:
            train_ = train_[0][list(chosen)], train_[1][list(chosen)]
        return head, linear_probe(head, [train_], [heldout], self.classes)


def heldout_accuracy(model: TaskModel) -> float:
    """Return the held-out accuracy in [0, 1] of a linear probe on a frozen backbone; the test split is not looked at."""
    return model.features(("train", "heldout")).heldout_accuracy()


def balanced_subset(labels: Tensor, count: int, classes: int, seed: int) -> list[int]:
    """Return the numbers of `count` samples (at least one a class), as equally many of each class as there are.

    >>> balanced_subset(torch.tensor([0, 0, 0, 1]), 2, 2, seed=0)[-1]
    3
    """
    order = torch.randperm(len(labels), generator=generator(seed, "few")).tolist()
    by_class = [[index for index in order if int(labels[index]) == label] for label in range(classes)]
    turns = [indices[turn] for turn in range(count) for indices in by_class if turn < len(indices)]
    return sorted(turns[: max(count, classes)])
