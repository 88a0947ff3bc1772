"""`+protocol=warm`: reward models from real ratings, their weight average, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation import best_of_n, best_of_n_kl, predict, score
from soups.launch.progress import ReportProgress
from soups.launch.settings import LAYOUT, TRAINING_VERSION, Settings, build_network, build_splits, check
from soups.launch.start import device_for, evaluation_batches
from soups.launch.tracking import node_run, summarise
from soups.launch.training import train
from soups.protocols import Operation, Output, Plan, Work
from soups.protocols.warm import Group, Layout, Rewards, Study, best_first, layerwise, layout
from soups.reporting.page import Curves, Page, Part, Table
from soups.stores import write_safetensors
from soups.stores.files import replacing_folder
from soups.stores.pool import Pool
from soups.tasks.data import Samples, Splits
from soups.tasks.network import Network
from soups.tasks.preferences import Pairs, RewardInput, parts
from soups.tasks.probe import linear_probe
from soups.tasks.texts import Texts
from soups.weights import RunningSum, Weights

PROBABILITIES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Warm:
    """The protocol of `conf/protocol/warm.yaml`.

    Args:
        settings: all settings; `data` are the preferences, `optimizer`, `trainer` and `loader` those of every fit.
        study: fields of `soups.protocols.warm.Study`.
        trajectory: `pairs` and `epochs` of the fine-tuning whose points the featurizers are.
        control: `pairs` and `epochs` of the control reward model, which sees other texts and labels without noise.
        candidates: texts of the test part that best-of-N chooses from; in-distribution pairs are those among them.
        ood_texts: texts of each out-of-distribution domain.
        sizes: the N of best-of-N.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "warm"

    def __init__(
        self,
        settings: Settings,
        study: Mapping[str, Any],
        trajectory: Mapping[str, int],
        control: Mapping[str, int],
        candidates: int = 400,
        ood_texts: int = 150,
        sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    ) -> None:
        check(settings)
        if not str(settings["data"]["_target_"]).endswith(".preferences"):
            raise ConfigError(
                "protocol=warm judges by ratings: use data=preferences. For files see soups.protocols.warm."
            )
        if not sizes or max(sizes) > candidates:
            raise ConfigError(f"protocol.sizes={list(sizes)} needs numbers up to protocol.candidates={candidates}.")
        self.settings, self.sizes = settings, [int(size) for size in sizes]
        self.candidates, self.ood_texts = candidates, ood_texts
        self.study = Study(**study)
        self.fits = {"trajectory": dict(trajectory), "control": dict(control)}

    def layout(self) -> Layout:
        """Return the nodes."""
        settings = self.settings
        trainer = {key: value for key, value in settings["trainer"].items() if key not in LAYOUT}
        common = {
            "training_version": TRAINING_VERSION,
            "model": {key: value for key, value in settings["model"].items() if key != "dropout"},
            "optimizer": settings["optimizer"],
            "trainer": trainer,
            "task": settings["task"],
            "size": settings["loader"]["size"],
            "batch_size": settings["loader"]["batch_size"],
        }
        data = {key: value for key, value in settings["data"].items() if key not in ("swapped", "part")}
        changes: dict[str, Any] = {}
        for part, fit in self.fits.items():
            own = {**data, "train": fit["pairs"], "part": part, "swapped": 0.0}
            own["rater"] = "all" if part == "control" else data["rater"]
            changes[part] = {"data": own, "trainer": {**trainer, "max_epochs": fit["epochs"]}}
        texts = {"candidates": self.candidates, "ood_texts": self.ood_texts}
        return layout(self.study, common, data, changes["trajectory"], changes["control"], texts)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.layout().plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan's nodes do."""
        return {
            "trajectory": self._trajectory,
            "head": self._head,
            "member": self._member,
            "control": self._control,
            "warm": _warm,
            "rewards": self._rewards,
            "features": _features,
        }

    def _own(self, work: Work) -> Settings:
        """Return the settings of a node's fit."""
        parameters = work.parameters
        settings = self.settings
        own = {**settings, "data": parameters["data"], "model": {**settings["model"], **parameters["model"]}}
        if "trainer" in parameters:
            own["trainer"] = {**settings["trainer"], **parameters["trainer"]}
        if "rate" in parameters:
            own["optimizer"] = {**settings["optimizer"], "lr": parameters["rate"]}
            own["model"] = {**own["model"], "dropout": parameters["dropout"]}
        return {**own, "seed": parameters.get("seed", settings["seed"])}

    def _start(self, own: Settings, changes: Weights | None = None) -> dict[str, Tensor]:
        """Return the pretrained weights with some of them replaced."""
        network = build_network(own, 2)
        network.module.load_state_dict(dict(changes or {}), strict=False)
        return {name: tensor.detach().clone() for name, tensor in network.module.state_dict().items()}

    def _fit(
        self, work: Work, own: Settings, splits: Splits, start: dict[str, Tensor], *more: lightning.Callback
    ) -> Output:
        callbacks = [ReportProgress(work.pool, work.node.fingerprint), *more]
        with node_run(own, work) as logger:
            network, trainer = train(own, splits, start, callbacks, logger)
            device = trainer.strategy.root_device
            logits = predict(network.module.to(device), evaluation_batches(own, splits.heldout, network), device)
            numbers = score(logits, splits.heldout.labels)
            found = {"accuracy": numbers.accuracy, "loss": numbers.loss}
            summarise(logger, {f"heldout/{name}": value for name, value in found.items()})
        return Output(_trained(network), {"heldout": found})

    def _probe(self, own: Settings, splits: Splits, weights: Weights | None) -> dict[str, Tensor]:
        """Return the head that fits best on frozen features."""
        network = build_network(own, 2)
        network.module.load_state_dict(dict(weights or {}), strict=False)
        batches = [evaluation_batches(own, samples, network) for samples in (splits.train, splits.heldout)]
        linear_probe(network, batches[0], batches[1], 2, device_for(own))
        return {name: value for name, value in _trained(network).items() if name.startswith(f"{network.head}.")}

    def _trajectory(self, work: Work) -> Output:
        """Fine-tune from the linear probe with a constant rate, and keep points on the way."""
        own = self._own(work)
        own = {**own, "optimizer": {**own["optimizer"], "schedule": "constant"}}
        splits = build_splits(own)
        keep = KeepPoints(int(work.parameters["points"]))
        output = self._fit(work, own, splits, self._start(own, self._probe(own, splits, None)), keep)
        tensors = {
            f"{number}/{name}": value for number, point in enumerate(keep.points) for name, value in point.items()
        }
        return Output(tensors, output.metrics)

    def _head(self, work: Work) -> Output:
        """Fit the head that all members share, on the features of the trajectory's end."""
        own = self._own(work)
        splits = build_splits(own)
        body = _point(work.tensors(0), self.study.points - 1) if work.node.inputs else None
        return Output(self._probe(own, splits, body))

    def _member(self, work: Work) -> Output:
        """Fine-tune from a point of the trajectory with the shared head."""
        own = self._own(work)
        point = work.parameters["point"]
        body = {} if point is None else _point(work.tensors(1), int(point))
        return self._fit(work, own, build_splits(own), self._start(own, {**body, **work.tensors(0)}))

    def _control(self, work: Work) -> Output:
        """Fine-tune another reward model, on texts and labels that the members do not have."""
        own = self._own(work)
        splits = build_splits(own)
        return self._fit(work, own, splits, self._start(own, self._probe(own, splits, None)))

    def _rewards(self, work: Work) -> Output:
        """Give every text its reward."""
        own = self._own(work)
        network = build_network(own, 2)
        network.module.load_state_dict(work.tensors(0), strict=False)
        device = device_for(own)
        module = network.module.to(device)

        def rewards(samples: Samples) -> Tensor:
            return predict(module, evaluation_batches(own, samples, network), device)

        tensors = {
            f"texts/{name}": rewards(Texts(texts, [0] * len(texts)))[:, 0].contiguous()
            for name, (texts, _) in self.texts().items()
        }
        splits = build_splits(own)
        heldout = score(rewards(splits.heldout), splits.heldout.labels)
        return Output(
            {**tensors, "pairs": rewards(splits.train)},
            {"heldout": {"accuracy": heldout.accuracy, "loss": heldout.loss}},
        )

    def texts(self) -> dict[str, tuple[list[str], Tensor]]:
        """Return the texts that are scored and their mean ratings (N,), by split: the test part's, and other domains'."""
        data = self.settings["data"]
        found: dict[str, tuple[list[str], Tensor]] = {}
        for name, domain, size in (
            ("test", data["domain"], self.candidates),
            *((name, name, self.ood_texts) for name in data["ood"] if name != data["domain"]),
        ):
            rated = parts(domain, int(data["split_seed"]))["test"][:size]
            if len(rated) < size:
                raise ConfigError(f"{domain} has only {len(rated)} test texts, fewer than the {size} asked for.")
            rated = sorted(rated, key=lambda one: len(one.text))  # of like lengths: batches pad little
            found[name] = ([one.text for one in rated], torch.tensor([one.mean for one in rated]))
        return found

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        del plan
        found = self.layout()
        means = {name: means for name, (_, means) in self.texts().items()}
        gap = float(self.settings["data"]["gap"])
        control = Rewards.of(pool.weights(found.control_scores.fingerprint)).texts["test"]
        control = (control - control.mean()) / control.std()
        rows: list[list[Any]] = []
        domains: list[list[Any]] = []
        highlight: list[int] = []
        wrong: dict[str, list[float | None]] = {}
        parts_: list[Part] = []
        for group in found.groups:
            models, singles, accuracies = self._models(group, pool)
            pairs = self._training_pairs(group)
            mistaken = pairs.labels != pairs.truth
            table = [
                self._row(group.share, f"member {number + 1}", single, accuracies[number], means, gap, pairs, mistaken)
                for number, single in enumerate(singles)
            ]
            numbers = [_mean(column) for column in list(zip(*table, strict=True))[2:]]
            table.append([f"{group.share:.0%}", "mean of members", *numbers])
            for name, rewards in models.items():
                heldout = {
                    "best single": max(accuracies),
                    "WARM": pool.ingredient(group.warm_scores.fingerprint).heldout(),
                }
                if name == "WARM":
                    highlight.append(len(rows) + len(table))
                table.append(self._row(group.share, name, rewards, heldout.get(name), means, gap, pairs, mistaken))
            rows += [line[:8] for line in table]
            domains += [[*line[:2], *line[8:]] for line in table]
            for line in table[len(singles) :]:
                wrong.setdefault(line[1], []).append(line[6])
            parts_ += self._best_of_n(group.share, {**models, "mean of members": singles}, means["test"], control)
        largest = self.sizes[-1]
        main = Table(
            title="WARM against its members",
            columns=[
                "swapped", "model", "held-out, %", "ID, %", "OOD, %", "fit of labels, %", "fit of wrong labels, %",
                f"best of {largest}: rating",
            ],
            rows=rows,
            highlight=highlight,
            note=(
                f"ID and OOD: all pairs of test texts whose mean ratings differ by {gap} or more, ordered rightly. Members are "
                f"ranked on held-out pairs, whose labels are as noisy as the training pairs'. Wrong labels: those of training "
                f"pairs that contradict the mean of all raters, swapped or not."
            ),
        )  # fmt: skip
        others = Table(
            title="OOD pairs by domain",
            columns=["swapped", "model", *(f"{name}, %" for name in means if name != "test")],
            rows=domains,
            highlight=highlight,
        )
        memory = Curves(
            title="Wrong training labels that are reproduced",
            x_label="labels swapped, %",
            y_label="agreement with wrong labels, %",
            x=[100 * group.share for group in found.groups],
            series=wrong,
        )
        more = [memory] if len(found.groups) > 1 else []
        if found.features is not None:
            more.append(self._features_part(pool.ingredient(found.features.fingerprint).notes))
        return Page(
            title="WARM",
            subject="protocol",
            summary=self._summary(rows),
            parts=[main, others, *parts_, *more],
            lineage={
                f"{group.share:.0%} swapped": {
                    "members": [pool.ingredient(node.fingerprint).weights for node in group.members],
                    "average": pool.ingredient(group.warm.fingerprint).weights,
                    "averaged": pool.ingredient(group.warm.fingerprint).notes["members"],
                }
                for group in found.groups
            },
        )

    def _models(self, group: Group, pool: Pool) -> tuple[dict[str, Rewards], list[Rewards], list[float]]:
        singles = [Rewards.of(pool.weights(node.fingerprint)) for node in group.scores]
        accuracies = [pool.ingredient(node.fingerprint).heldout() for node in group.members]
        best = best_first(accuracies, self.study.keep)
        kept = [singles[number] for number in best]
        models = {
            "best single": singles[best[0]],
            "ensemble": Rewards.together(kept),
            "median": Rewards.together(kept, "median"),
            "WARM": Rewards.of(pool.weights(group.warm_scores.fingerprint)),
        }
        return models, singles, accuracies

    def _training_pairs(self, group: Group) -> Pairs:
        train_split = build_splits({**self.settings, "data": group.members[0].parameters["data"]}).train
        assert isinstance(train_split, Pairs)
        return train_split

    def _row(
        self,
        share: float,
        name: str,
        rewards: Rewards,
        heldout: float | None,
        means: Mapping[str, Tensor],
        gap: float,
        pairs: Pairs,
        mistaken: Tensor,
    ) -> list[Any]:
        accuracy = {split: 100 * value for split, value in rewards.accuracy(means, gap).items()}
        others = [value for split, value in accuracy.items() if split != "test"]
        fitted = [rewards.agreement(pairs.labels, among) for among in (torch.ones_like(mistaken), mistaken)]
        return [
            f"{share:.0%}", name, None if heldout is None else 100 * heldout, accuracy["test"], _mean(others),
            *(None if value is None else 100 * value for value in fitted),
            best_of_n(rewards.texts["test"], means["test"], self.sizes[-1:])[0], *others,
        ]  # fmt: skip

    def _best_of_n(
        self, share: float, models: Mapping[str, Rewards | list[Rewards]], gold: Tensor, control: Tensor
    ) -> list[Part]:
        judged: list[Part] = []
        for label, judge in (("mean rating", gold), ("control reward, standard deviations", control)):
            series: dict[str, list[float | None]] = {}
            for name, rewards in models.items():
                several = rewards if isinstance(rewards, list) else [rewards]
                curves = [best_of_n(one.texts["test"], judge, self.sizes) for one in several]
                series[name] = [_mean(list(values)) for values in zip(*curves, strict=True)]
            judged.append(
                Curves(
                    title=f"Best of N by {label.partition(',')[0]}, {share:.0%} swapped",
                    x_label=f"KL from the sampled texts, nats (N = {', '.join(map(str, self.sizes))})",
                    y_label=label,
                    x=[best_of_n_kl(size) for size in self.sizes],
                    series=series,
                )
            )
        return judged

    def _features_part(self, notes: Mapping[str, Any]) -> Curves:
        series: dict[str, list[float | None]] = {}
        for depth, measured in notes["layers"].items():
            series[f"average, {depth} layer{'s' if int(depth) > 1 else ''}"] = measured["average"]
        series["ensemble, 2 layers"] = notes["layers"].get("2", next(iter(notes["layers"].values())))["ensemble"]
        for depth in notes["layers"]:
            series[f"p^{depth}"] = [chance ** int(depth) for chance in notes["probabilities"]]
        return Curves(
            title="Weight of a feature that each member has with probability p",
            x_label="p",
            y_label="weight, relative to a member that has it",
            x=notes["probabilities"],
            series=series,
        )

    def _summary(self, rows: Sequence[Sequence[Any]]) -> str:
        sentences: list[str] = []
        for share in dict.fromkeys(row[0] for row in rows):
            by_name = {row[1]: row for row in rows if row[0] == share}
            warm, best, together = by_name["WARM"], by_name["best single"], by_name["ensemble"]
            sentences.append(
                f"With {share} of the labels swapped, WARM orders {warm[3]:.1f} % of the in-distribution and {warm[4]:.1f} % of "
                f"the OOD pairs rightly (best single {best[3]:.1f} and {best[4]:.1f}, ensemble {together[3]:.1f} and "
                f"{together[4]:.1f})"
            )
            if warm[6] is not None:
                sentences[-1] += (
                    f" and reproduces {warm[6]:.1f} % of the wrong training labels (best single {best[6]:.1f}, ensemble "
                    f"{together[6]:.1f})"
                )
            sentences[-1] += "."
        return " ".join(sentences)

    def export(self, plan: Plan, pool: Pool, folder: Path) -> None:
        """Write the averages as folders that transformers and TRL load."""
        del plan
        for group in self.layout().groups:
            place = folder / f"reward_model_{round(100 * group.share)}"
            if place.is_dir():
                continue
            own = {**self.settings, "data": group.members[0].parameters["data"]}
            network = build_network(own, 2)
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
            self.points.append(_trained_of(model))


def _trained(network: Network) -> dict[str, Tensor]:
    """Return the weights that fits change; the others are the pretrained ones, wherever the model is built."""
    return _trained_of(network.module)


def _trained_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().cpu().clone().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _point(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{number}/")}


def _warm(work: Work) -> Output:
    """Average the best members."""
    accuracies = [work.record(number).heldout() for number in range(len(work.node.inputs))]
    best = best_first(accuracies, int(work.parameters["keep"]))
    total = RunningSum()
    for number in sorted(best):
        total.add(work.tensors(number), where=work.record(number).short)
    weights = total.mean()
    return Output(weights, notes={"members": [work.record(number).fingerprint for number in best]})


def _features(work: Work) -> Output:
    """Measure the weight of features in averages of networks of some depths."""
    seed = int(work.parameters["seed"])
    measured = {str(depth): layerwise(int(depth), PROBABILITIES, seed=seed) for depth in work.parameters["layers"]}
    return Output(notes={"layers": measured, "probabilities": list(PROBABILITIES)})


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
