"""Members of a protocol: one body (an encoder, a backbone) on a task of its own, with a head of its own.

The body is every tensor of the network but its head. Bodies are what protocols average; heads are fitted anew by a linear
probe wherever a body meets a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from torch import Tensor

from soups.evaluation import predict, score
from soups.launch.settings import LAYOUT, TRAINING_VERSION, Settings, build_network, build_splits
from soups.launch.start import device_for, evaluation_batches
from soups.launch.training import train
from soups.seeding import generator
from soups.tasks.data import Samples, Splits
from soups.tasks.network import Network
from soups.tasks.probe import Probe, head_inputs, linear_probe
from soups.weights import Weights, check_same


@dataclass
class Member:
    """A network on a task.

    Attributes:
        settings: all settings, with this task's data.
        splits: the task.
        network: the model, its head as wide as the task has classes.
    """

    settings: Settings
    splits: Splits
    network: Network

    def predictions(self, samples: Samples) -> Tensor:
        """Return logits (N, classes) on some samples."""
        device = device_for(self.settings)
        module = self.network.module.to(device)
        return predict(module, evaluation_batches(self.settings, samples, self.network), device)

    def accuracy(self, samples: Samples) -> dict[str, float]:
        """Return accuracy in [0, 1], loss in nats and count on some samples."""
        numbers = score(self.predictions(samples), samples.labels)
        return {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}

    def probe(self) -> None:
        """Fit the head on the frozen body; the held-out split chooses its penalty."""
        train, heldout = (
            evaluation_batches(self.settings, part, self.network) for part in (self.splits.train, self.splits.heldout)
        )
        linear_probe(self.network, train, heldout, len(self.splits.classes), device_for(self.settings))

    def fit(self, callbacks: Sequence[lightning.Callback] = (), logger: Any | None = None) -> lightning.Trainer:
        """Train the network from where it is, as the settings say."""
        start = {name: tensor.detach().clone().cpu() for name, tensor in self.network.module.state_dict().items()}
        self.network, trainer = train(self.settings, self.splits, start, callbacks, logger)
        return trainer

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, copied."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.module.state_dict().items()}

    def body(self) -> dict[str, Tensor]:
        """Return the weights without the head."""
        return body_of(self.network)


def member(
    settings: Settings,
    data: Mapping[str, Any],
    body: Weights | None = None,
    splits: Splits | None = None,
    pretrained: bool = True,
    **changes: Any,
) -> Member:
    """Build a member.

    Args:
        settings: all settings.
        data: the task's own `data` section.
        body: weights to start from; the pretrained ones when None.
        splits: the task, where it is built already.
        pretrained: false where the weights are loaded by the caller.
        changes: sections that differ from the settings'.

    Raises:
        soups.errors.WeightsError: the body is another architecture's.
    """
    own: Settings = {**settings, "data": dict(data), **changes}
    splits = splits or build_splits(own)
    if body is not None or not pretrained:
        own["model"] = {**own["model"], "pretrained": False}
    network = build_network(own, len(splits.classes))
    if body is not None:
        load_body(network, body)
    return Member({**own, "model": dict(settings["model"])}, splits, network)


def body_of(network: Network) -> dict[str, Tensor]:
    """Return a network's weights without its head, copied."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in network.module.state_dict().items()
        if not name.startswith(f"{network.head}.")
    }


def load_body(network: Network, body: Weights) -> None:
    """Put a body into a network; its head stays.

    Raises:
        soups.errors.WeightsError: the body does not fit.
    """
    check_same(body_of(network), body, where="the body")
    network.module.load_state_dict(dict(body), strict=False)


def frozen_names(network: Network) -> list[str]:
    """Return the names of the body's parameters that are not trained."""
    return [name for name, parameter in network.module.named_parameters() if not parameter.requires_grad]


@dataclass(frozen=True)
class Features:
    """What enters the head of a frozen body: float32 (N, features), and labels (N,), by split."""

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]

    def probe(self, classes: int, shots: int | None = None, seed: int = 0) -> dict[str, float]:
        """Return the test accuracy in [0, 1] and loss in nats of a linear probe on all or on `shots` training samples."""
        chosen = None if shots is None else few(self.labels["train"], shots, classes, seed)
        head, _ = self._fitted(classes, chosen)
        with torch.inference_mode():
            numbers = score(head.module(self.inputs["test"]), self.labels["test"])
        return {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}

    def heldout_accuracy(self, classes: int) -> float:
        """Return the held-out accuracy in [0, 1] of a linear probe; the held-out split chose its penalty."""
        return self._fitted(classes)[1].heldout_accuracy

    def _fitted(self, classes: int, chosen: Sequence[int] | None = None) -> tuple[Network, Probe]:
        """Return a head fitted to all or some training samples, and how well it did on the held-out split."""
        head = Network(torch.nn.Linear(self.inputs["train"].shape[1], classes), cast(Any, None), "")
        train, heldout = ((self.inputs[split], self.labels[split]) for split in ("train", "heldout"))
        if chosen is not None:
            train = train[0][list(chosen)], train[1][list(chosen)]
        return head, linear_probe(head, [train], [heldout], classes)


def features(one: Member, names: Sequence[str] = ("train", "heldout", "test")) -> Features:
    """Run a member's frozen body over its splits, or some of them."""
    splits = {name: getattr(one.splits, name) for name in names}
    inputs: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for name, samples in splits.items():
        batches = evaluation_batches(one.settings, samples, one.network)
        found, targets = head_inputs(one.network, batches, device_for(one.settings))
        inputs[name], labels[name] = torch.from_numpy(found), torch.from_numpy(targets)
    return Features(inputs, labels)


def heldout_accuracy(one: Member) -> float:
    """Return the held-out accuracy in [0, 1] of a linear probe on a member's frozen body; the test split is not looked at."""
    return features(one, ("train", "heldout")).heldout_accuracy(len(one.splits.classes))


def few(labels: Tensor, count: int, classes: int, seed: int) -> list[int]:
    """Return the numbers of `count` samples (at least one a class), as equally many of each class as there are.

    >>> few(torch.tensor([0, 0, 0, 1]), 2, 2, seed=0)[-1]
    3
    """
    order = torch.randperm(len(labels), generator=generator(seed, "few")).tolist()
    by_class = [[index for index in order if int(labels[index]) == label] for label in range(classes)]
    turns = [indices[turn] for turn in range(count) for indices in by_class if turn < len(indices)]
    return sorted(turns[: max(count, classes)])


def fit_parameters(settings: Settings) -> dict[str, Any]:
    """Return what decides a fit, its data, start and seed apart."""
    return {
        "training_version": TRAINING_VERSION,
        "input": {"size": settings["loader"]["size"]},
        "task": settings["task"],
        "optimizer": settings["optimizer"],
        "augment": settings["augment"],
        "batch_size": settings["loader"]["batch_size"],
        "trainer": {key: value for key, value in settings["trainer"].items() if key not in LAYOUT},
        "callbacks": settings.get("callbacks") or {},
    }
