"""`+protocol=fusing`, `ratatouille`, `lo_fi`: plans that recycle or spread fine-tunes for one target task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from soups.errors import ConfigError, DataError
from soups.evaluation import ood_mean
from soups.launch.bodies import Member, fit_parameters, load_body, member
from soups.launch.progress import ReportProgress
from soups.launch.settings import Settings, check
from soups.launch.tracking import node_run
from soups.protocols import Operation, Output, Plan, Work
from soups.protocols.fusing import fusing
from soups.protocols.lo_fi import lo_fi
from soups.protocols.ratatouille import ratatouille
from soups.protocols.recycling import Judged, Target
from soups.reporting.page import Page, Point, Scatter, Table
from soups.seeding import generator
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.texts import Texts
from soups.weights import RunningSum, check_same


class Recycling:
    """A protocol for one target task; `Fusing`, `Ratatouille` and `LoFi` say which plan.

    Args:
        settings: all settings; `data` is the target task.
        judged: the plan.
        name, title: of the protocol.
        question: the models whose difference the summary states, the first minus the second.
    """

    def __init__(self, settings: Settings, judged: Judged, name: str, title: str, question: tuple[str, str]) -> None:
        self.settings, self.judged = settings, judged
        self.name, self.title, self.question = name, title, question

    def plan(self) -> Plan:
        """Return the plan."""
        return self.judged.plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan asks for."""
        return {
            "body.fit": self._body,
            "body.mean": _mean,
            "target.start": self._start,
            "target.fit": self._fit,
            "target.mean": _mean,
            "target.score": self._score,
        }

    def _body(self, work: Work) -> Output:
        one = member(self.settings, work.parameters["data"], seed=work.parameters["seed"])
        one.probe()
        with node_run(one.settings, work) as logger:
            one.fit([ReportProgress(work.pool, work.node.fingerprint)], logger)
        return Output(one.body(), {"heldout": one.accuracy(one.splits.heldout)})

    def _start(self, work: Work) -> Output:
        body = work.tensors(0) if work.node.inputs else None
        one = member(self.settings, work.parameters["data"], body)
        one.probe()
        return Output(one.weights(), {"heldout": one.accuracy(one.splits.heldout)})

    def _fit(self, work: Work) -> Output:
        parameters = work.parameters
        changes: dict[str, Any] = {"seed": parameters["seed"]}
        one = self._loaded(work, changes)
        if len(work.node.inputs) > 1:
            load_body(one.network, work.tensors(1))
        if parameters["shard"]:
            number, count = parameters["shard"]
            one.splits = shard(one.splits, number, count)
            loader = one.settings["loader"]
            size, rest = divmod(int(loader["batch_size"]), count)
            if rest or not size:
                raise ConfigError(f"loader.batch_size={loader['batch_size']} cannot be shared out among {count} nodes.")
            one.settings = {**one.settings, "loader": {**loader, "batch_size": size}}
        with node_run(one.settings, work) as logger:
            one.fit([ReportProgress(work.pool, work.node.fingerprint)], logger)
        return Output(one.weights(), {"heldout": one.accuracy(one.splits.heldout)})

    def _score(self, work: Work) -> Output:
        one = self._loaded(work, {})
        splits = {"heldout": one.splits.heldout, **one.splits.reported()}
        return Output(metrics={name: one.accuracy(samples) for name, samples in splits.items()})

    def _loaded(self, work: Work, changes: Mapping[str, Any]) -> Member:
        """Return the first input's model, head included, on the target."""
        one = member(self.settings, work.parameters["data"], pretrained=False, **changes)
        weights = work.tensors(0)
        check_same(one.network.module.state_dict(), weights, where="the model")
        one.network.module.load_state_dict(weights)
        return one

    def rows(self, pool: Pool) -> dict[str, dict[str, float]]:
        """Return accuracies in [0, 1] by model and split; groups as the mean of their members."""
        found = {
            name: {split: values["accuracy"] for split, values in pool.ingredient(node.fingerprint).metrics.items()}
            for name, node in self.judged.scores.items()
        }
        for group, names in self.judged.groups.items():
            found[group] = {split: sum(found[name][split] for name in names) / len(names) for split in found[names[0]]}
        return found

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report: the table of all models, and held-out against OOD accuracy."""
        rows = self.rows(pool)
        splits = list(next(iter(rows.values())))
        has_ood = len(splits) > 2
        columns = ["model", *(f"{split}, %" for split in splits), *(["OOD mean, %"] if has_ood else [])]
        cells = [
            [name, *(100 * row[split] for split in splits), *([100 * ood_mean(row)] if has_ood else [])]
            for name, row in rows.items()
        ]
        second = "OOD mean" if has_ood else "test"
        points = {
            name: [Point(name=name, x=100 * row["heldout"], y=100 * (ood_mean(row) if has_ood else row["test"]))]
            for name, row in rows.items()
        }
        one, two = (rows[name] for name in self.question)
        change = f"{100 * (one['test'] - two['test']):+.2f} points on test"
        change += f", {100 * (ood_mean(one) - ood_mean(two)):+.2f} OOD" if has_ood else ""
        return Page(
            title=self.title,
            subject="protocol",
            summary=f"{self.question[0]} against {self.question[1]}: {change} (one seed).",
            parts=[
                Table(title=f"{self.title}: accuracy", columns=columns, rows=cast(Any, cells),
                      highlight=[list(rows).index(self.question[0])]),
                Scatter(title="Held-out against test" if not has_ood else "Held-out against OOD accuracy",
                        x_label="held-out accuracy, %", y_label=f"{second} accuracy, %", groups=points),
            ],
            lineage={name: pool.ingredient(node.fingerprint).weights for name, node in self.judged.models.items()},
        )  # fmt: skip


def Fusing(settings: Settings, auxiliary: Mapping[str, Mapping[str, Any] | None]) -> Recycling:
    """Return fusing (arXiv:2204.03044) with these settings; `auxiliary` are `data` sections by name."""
    judged = fusing(_target(settings), _given(auxiliary))
    return Recycling(settings, judged, "fusing", "Fusing", ("from the fused body", "from pretrained"))


def Ratatouille(settings: Settings, auxiliary: Mapping[str, Mapping[str, Any] | None]) -> Recycling:
    """Return Model Ratatouille (arXiv:2212.10445) with these settings; `auxiliary` are `data` sections by name."""
    judged = ratatouille(_target(settings), _given(auxiliary))
    return Recycling(settings, judged, "ratatouille", "Model Ratatouille", ("ratatouille", "uniform soup"))


def LoFi(settings: Settings, nodes: int) -> Recycling:
    """Return lo-fi (arXiv:2210.11948) with so many nodes."""
    return Recycling(settings, lo_fi(_target(settings), nodes), "lo_fi", "lo-fi", ("lo-fi", "synchronous (DDP)"))


def _given(tasks: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    return {name: dict(data) for name, data in tasks.items() if data is not None}


def _target(settings: Settings) -> Target:
    check(settings)
    return Target(dict(settings["model"]), fit_parameters(settings), dict(settings["data"]), int(settings["seed"]))


def _mean(work: Work) -> Output:
    total = RunningSum()
    for number, node in enumerate(work.node.inputs):
        total.add(work.tensors(number), where=node.label)
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
