"""The report of a ColD Fusion study: accuracy by round, the table of all models, and the repository's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soups.protocols.cold_fusion.plan import ColdFusionNodes, ColdFusionStudy
from soups.protocols.cold_fusion.repository import Repository
from soups.protocols.plan import Node
from soups.reporting.page import Curves, Page, Part, Table
from soups.stores.pool import Pool


def cold_fusion_page(study: ColdFusionStudy, nodes: ColdFusionNodes, pool: Pool, repository: Repository) -> Page:
    """Return the report."""
    scores = _Scores(study, nodes, pool)
    order = ["pretrained", *(f"round {number}" for number in range(1, study.rounds + 1))]
    first, last = (scores.mean(nodes.probes, model, "seen", "frozen") for model in (order[0], order[-1]))
    assert first is not None
    assert last is not None
    parts: list[Part] = [
        scores.table(order[-1]),
        Curves(
            title="Accuracy by round",
            x_label="round",
            y_label="test accuracy, %",
            x=[float(number) for number in range(len(order))],
            series=scores.curves(order),
        ),
        scores.by_task(),
        log_table(repository),
    ]
    return Page(
        title="ColD Fusion",
        subject="protocol",
        summary=(
            f"After {study.rounds} {study.mode} rounds the base's linear probes on the {len(study.seen)} seen tasks are right on "
            f"{last:.1f} % of the test texts, pretrained {first:.1f} %."
        ),
        parts=parts,
        lineage={"repository": repository.folder.url, "bases": [base.hash for base in repository.bases()]},
    )


class _Scores:
    """Accuracies of a finished study, in percent."""

    def __init__(self, study: ColdFusionStudy, nodes: ColdFusionNodes, pool: Pool) -> None:
        self.study, self.nodes, self.pool = study, nodes, pool
        groups = {"seen": list(study.seen), "unseen": list(study.unseen)}
        self.groups = {group: tasks for group, tasks in groups.items() if tasks}

    def of(self, node: Node, split: str) -> float:
        return 100 * self.pool.ingredient(node.fingerprint).metrics[split]["accuracy"]

    def mean(self, found: Mapping[tuple[str, str], Node], model: str, group: str, split: str) -> float | None:
        """Return the mean over a group's tasks; None where the model was not judged so."""
        values = [self.of(found[model, task], split) for task in self.groups[group] if (model, task) in found]
        return sum(values) / len(values) if values else None

    def curves(self, order: list[str]) -> dict[str, list[float | None]]:
        few = f"{self.study.shots}-shot probe"
        found: dict[str, list[float | None]] = {}
        for group in self.groups:
            for split, label in (("frozen", "linear probe"), ("few", few)):
                found[f"{group}, {label}"] = [self.mean(self.nodes.probes, model, group, split) for model in order]
        for group in self.groups:
            found[f"{group}, fine-tuned"] = [
                self.mean(self.nodes.fine_tuned, model, group, "fine-tuned") for model in order
            ]
        return found

    def table(self, last: str) -> Table:
        columns = ["model"]
        rows: dict[str, list[Any]] = {model: [model] for model in self.nodes.models}
        for group in self.groups:
            for found, split, label in (
                (self.nodes.probes, "frozen", "probe"),
                (self.nodes.probes, "few", f"{self.study.shots}-shot"),
                (self.nodes.fine_tuned, "fine-tuned", "fine-tuned"),
            ):
                columns.append(f"{group} {label}, %")
                for model, row in rows.items():
                    row.append(self.mean(found, model, group, split))
        return Table(
            title="ColD Fusion: test accuracy",
            columns=columns,
            rows=list(rows.values()),
            highlight=[list(rows).index(last)],
            note="Means over tasks. Fine-tuned: not all rounds.",
        )

    def by_task(self) -> Table:
        tasks = [task for group in self.groups.values() for task in group]
        return Table(
            title="Linear probe by task",
            columns=["model", *(f"{task}, %" for task in tasks)],
            rows=[
                [model, *(self.of(self.nodes.probes[model, task], "frozen") for task in tasks)]
                for model in self.nodes.models
            ],
        )


def log_table(repository: Repository) -> Table:
    """Return the repository's log: what each round did with each contribution."""
    return Table(
        title="Contributions",
        columns=["round", "contributor", "from base", "update norm", "outcome"],
        rows=[
            [
                record.number,
                verdict.contributor,
                verdict.started,
                verdict.norm,
                "fused" if verdict.accepted else verdict.reason,
            ]
            for record in repository.rounds()
            for verdict in record.verdicts
        ],
    )
