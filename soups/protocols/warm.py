"""WARM: weight averaged reward models (arXiv:2401.12187).

M reward models are fine-tuned from one start: one linear-probed head for all, data order, learning rate and dropout of their
own, and featurizers taken at points along one fine-tuning trajectory (Baklava). The average of their weights is one model
that is judged against their ensemble (the mean of their rewards), the median of their rewards and the best of them.

The paper ranks its members on the out-of-distribution set that it also reports; here they are ranked on a held-out split
that nothing else is reported on.

`average` works on reward models that exist already, of any origin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from soups.errors import ConfigError, WeightsError
from soups.evaluation import pair_accuracy
from soups.merging import merge
from soups.protocols.plan import Node, Plan
from soups.seeding import generator
from soups.stores import Store, open_store
from soups.stores.tokenizer import tokenizer_hash

Settings = Mapping[str, Any]
Model = str | os.PathLike[str]


def best_first(scores: Sequence[float], keep: int) -> list[int]:
    """Return the numbers of the `keep` highest scores, best first; of equal ones the earlier is first.

    Raises:
        ConfigError: there are fewer than `keep` scores, or `keep` is not positive.

    >>> best_first([0.7, 0.9, 0.7], 2)
    [1, 0]
    """
    if not 1 <= keep <= len(scores):
        raise ConfigError(f"WARM averages from 1 to {len(scores)} members here, not {keep} (protocol.keep).")
    return sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:keep]


def average(
    models: Sequence[Model | tuple[Model, Model]],
    out: str | os.PathLike[str] | None = None,
    scores: Sequence[float] | None = None,
    keep: int | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor] | Path | str:
    """Average reward models: φ = 1/M Σ φᵢ, streamed from and to files.

    A folder that comes out loads like the ones that went in, for Hugging Face models with
    `AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)`.

    Args:
        models: folders or files of sequence classifiers with one label, as `soups.stores.open_store` takes them; a pair of a
            model and a LoRA adapter for it is merged first. They must share their start: the pretrained weights and the head.
        out: a folder, a file, or None to return the weights.
        scores: of each model on held-out preferences, higher is better; needed with `keep`.
        keep: average only the best so many.
        overwrite: replace what is at `out`.

    Raises:
        ConfigError: fewer than two models, or scores that do not fit.
        WeightsError: a model has another number of labels, another architecture, vocabulary or tokenizer.
        soups.errors.StorageError: a model cannot be read, or `out` not be written.
    """
    chosen = list(models)
    if keep is not None:
        if scores is None or len(scores) != len(chosen):
            raise ConfigError(f"keep={keep} needs one held-out score for each of the {len(chosen)} models.")
        chosen = [chosen[number] for number in best_first(scores, keep)]
    if len(chosen) < 2 and keep != 1:
        raise ConfigError(f"An average needs at least two reward models; {len(chosen)} given.")
    with ExitStack() as stack:
        stores: list[Store] = []
        tokenizers: dict[str, str] = {}
        for place in chosen:
            model, adapter = place if isinstance(place, tuple) else (place, None)
            stores.append(stack.enter_context(open_store(model, adapter=adapter)))
            config = Path(model) / "config.json"
            if config.is_file():
                labels = _labels(cast(Mapping[str, Any], json.loads(config.read_text())))
                if labels != 1:
                    raise WeightsError(f"{model} has {labels} labels; a reward model has one (num_labels=1).")
            if found := tokenizer_hash(model):
                tokenizers.setdefault(found, str(model))
                if len(tokenizers) > 1:
                    first = next(iter(tokenizers.values()))
                    raise WeightsError(
                        f"{model} comes with another tokenizer than {first}: its token ids mean other tokens, so that an "
                        f"average of their embeddings means nothing. Leave it out, or train it with the others' tokenizer."
                    )
        # Merged adapters have no configuration and tokenizer of their own: the first one's base gives them.
        base = chosen[0][0] if isinstance(chosen[0], tuple) else None
        return merge("linear", stores, base=base, out=out, overwrite=overwrite)


def _labels(config: Mapping[str, Any]) -> int:
    """Return the number of labels that a Hugging Face configuration gives a sequence classifier."""
    if "num_labels" in config:
        return int(config["num_labels"])
    return len(config["id2label"]) if "id2label" in config else 2


@dataclass(frozen=True)
class Study:
    """What a run of WARM is made of; every field decides results.

    Attributes:
        members: how many are trained for each share of swapped labels.
        keep: how many of them, by held-out accuracy, are averaged.
        swapped: shares of training and held-out pairs whose labels are turned round besides their natural noise.
        rates: learning rates, taken by turns.
        dropouts: dropout rates, taken by turns among the members of equal learning rate.
        points: how many points of the trajectory the members start from, by turns; 0: all from the pretrained encoder.
        seed: of everything that is random.
        layers: depths of the networks of the feature experiment; empty leaves it out.
    """

    members: int = 4
    keep: int = 3
    swapped: Sequence[float] = (0.0, 0.25)
    rates: Sequence[float] = (5e-5, 1e-4)
    dropouts: Sequence[float] = (0.05, 0.1)
    points: int = 3
    seed: int = 0
    layers: Sequence[int] = (1, 2, 3)

    def __post_init__(self) -> None:
        best_first([0.0] * self.members, self.keep)
        if not self.swapped or not self.rates or not self.dropouts or self.points < 0:
            raise ConfigError(
                "protocol.swapped, .rates and .dropouts need at least one value each; .points at least 0."
            )

    def differences(self, number: int) -> dict[str, Any]:
        """Return what member `number` has of its own."""
        return {
            "rate": float(self.rates[number % len(self.rates)]),
            "dropout": float(self.dropouts[number // len(self.rates) % len(self.dropouts)]),
            "point": number % self.points if self.points else None,
        }


@dataclass(frozen=True)
class Group:
    """The nodes for one share of swapped labels.

    Attributes:
        share: of swapped labels.
        head: the linear probe that all members start with.
        members: the fits.
        warm: the average of the best members.
        scores: rewards of each member, in their order.
        warm_scores: rewards of the average.
    """

    share: float
    head: Node
    members: tuple[Node, ...]
    warm: Node
    scores: tuple[Node, ...]
    warm_scores: Node


@dataclass(frozen=True)
class Layout:
    """The nodes of a study, by what they are."""

    trajectory: Node | None
    groups: tuple[Group, ...]
    control: Node
    control_scores: Node
    features: Node | None

    def plan(self) -> Plan:
        """Return the plan whose targets are all scores."""
        targets = [node for group in self.groups for node in (*group.scores, group.warm_scores)]
        more = [node for node in (self.control_scores, self.features) if node is not None]
        return Plan((*targets, *more))


def layout(
    study: Study, common: Settings, data: Settings, trajectory: Settings, control: Settings, texts: Settings
) -> Layout:
    """Lay out a study as nodes.

    Args:
        study: its sizes and seed.
        common: what decides every fit (model, optimiser, trainer, batches); plain JSON values.
        data: the preferences' settings, without `swapped` and `part`.
        trajectory, control: changes of `common` for these two fits, with a `data` section of their own.
        texts: which texts are given rewards.
    """
    path: Node | None = None
    if study.points:
        parameters = {**common, **trajectory, "points": study.points, "seed": study.seed}
        path = Node("train", "trajectory", parameters, (), "trajectory")
    groups: list[Group] = []
    for share in study.swapped:
        pairs = {**data, "swapped": float(share), "part": "members"}
        title = f"{share:.0%} swapped"
        starts = (path,) if path else ()
        head = Node("train", "head", {**common, "data": pairs}, starts, f"head, {title}")
        members = tuple(
            Node(
                "train", "member",
                {**common, "data": pairs, "seed": study.seed * 1000 + number, **study.differences(number)},
                (head, *starts), f"member {number + 1}, {title}",
            )
            for number in range(study.members)
        )  # fmt: skip
        warm = Node("merge", "warm", {"keep": study.keep}, members, f"WARM, {title}")
        scoring = {"model": common["model"], "data": pairs, "size": common["size"], **texts}
        groups.append(
            Group(
                share,
                head,
                members,
                warm,
                tuple(Node("score", "rewards", scoring, (node,), f"rewards of {node.name}") for node in members),
                Node("score", "rewards", scoring, (warm,), f"rewards of {warm.name}"),
            )
        )
    judge = Node("train", "control", {**common, **control, "seed": study.seed}, (), "control reward model")
    pairs = {**data, "swapped": 0.0, "part": "members"}
    scoring = {"model": common["model"], "data": pairs, "size": common["size"], **texts}
    features = None
    if study.layers:
        parameters = {"layers": [int(depth) for depth in study.layers], "seed": study.seed}
        features = Node("score", "features", parameters, (), "features and layers")
    return Layout(
        path, tuple(groups), judge, Node("score", "rewards", scoring, (judge,), "rewards of the control"), features
    )


@dataclass(frozen=True)
class Rewards:
    """Rewards of one model: of the texts of each split (N,), and of the training pairs (P, 2)."""

    texts: Mapping[str, Tensor]
    pairs: Tensor

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Rewards:
        """Read the tensors of a score node."""
        texts = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("texts/")}
        return Rewards(texts, tensors["pairs"])

    @staticmethod
    def together(rewards: Sequence[Rewards], how: str = "mean") -> Rewards:
        """Return the mean (prediction ensemble) or the median of several models' rewards, text by text."""

        def reduce(values: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack([value.double() for value in values])
            return stacked.mean(dim=0) if how == "mean" else stacked.quantile(0.5, dim=0)

        texts = {name: reduce([one.texts[name] for one in rewards]) for name in rewards[0].texts}
        return Rewards(texts, reduce([one.pairs for one in rewards]))

    def accuracy(self, means: Mapping[str, Tensor], gap: float) -> dict[str, float]:
        """Return the share of all pairs that are ordered as the mean ratings are, by split."""
        return {name: pair_accuracy(self.texts[name], means[name], gap)[0] for name in means}

    def agreement(self, labels: Tensor, among: Tensor) -> float | None:
        """Return how often the training labels are reproduced among some training pairs; None where there are none."""
        if not among.any():
            return None
        chosen = (self.pairs[:, 1] > self.pairs[:, 0]).long()
        return float((chosen == labels)[among].double().mean())


def layerwise(
    layers: int, probabilities: Sequence[float], members: int = 64, features: int = 40, seed: int = 0, steps: int = 800
) -> dict[str, list[float]]:
    """Measure with which weight a feature that each member has with probability p enters their average.

    Members are linear networks of `layers` layers, one path a feature, f(x) = Σⱼ xⱼ Πₗ wₗⱼ, all from one start near zero and
    trained by gradient descent on a target that needs every feature; but a feature that a member's data lack is zero there, and
    is never learned. The paper argues that the ensemble then weights a feature by p, and the weight average by p to the
    power of the number of layers.

    Args:
        layers: L.
        probabilities: the p.
        members: M networks.
        features: for each p.
        seed: of the draw of features.
        steps: of gradient descent, with a rate of 0.2.

    Returns:
        For each p: the measured weight in the ensemble and in the weight average, each relative to that of a member that
        has the feature.
    """
    random = generator(seed, "features", layers)
    chance = torch.tensor(probabilities, dtype=torch.float64).repeat_interleave(features)
    present = torch.rand(members, len(chance), generator=random, dtype=torch.float64) < chance
    weights = torch.full((layers, members, len(chance)), 0.02, dtype=torch.float64)
    for _ in range(steps):
        product = weights.prod(dim=0)
        # Unit-variance independent features: the loss is Σⱼ (1 − Πₗ wₗⱼ)²/2 over those that the member's data have.
        error = (product - 1) * present
        weights = weights - 0.2 * torch.stack(
            [
                error * weights[[other for other in range(layers) if other != layer]].prod(dim=0)
                for layer in range(layers)
            ]
        )
    full = float(weights.prod(dim=0)[present].mean())
    ensemble = weights.prod(dim=0).mean(dim=0).view(len(probabilities), features).mean(dim=1) / full
    averaged = weights.mean(dim=1).prod(dim=0).view(len(probabilities), features).mean(dim=1) / full
    return {"ensemble": ensemble.tolist(), "average": averaged.tolist()}
