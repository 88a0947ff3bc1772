"""The report of fusing, Model Ratatouille and lo-fi: accuracy of all models on all splits."""

from __future__ import annotations

from typing import Any, cast

from soups.evaluation import ood_mean
from soups.protocols.recycling.plan import ModelComparison
from soups.reporting.page import ChartPoint, Page, Scatter, Table
from soups.stores.pool import Pool


def accuracies(found: ModelComparison, pool: Pool) -> dict[str, dict[str, float]]:
    """Return accuracies in [0, 1] by model and split; a group has the mean of its models."""
    rows = {
        name: {split: values["accuracy"] for split, values in pool.ingredient(node.fingerprint).metrics.items()}
        for name, node in found.scores.items()
    }
    for group, names in found.groups.items():
        rows[group] = {split: sum(rows[name][split] for name in names) / len(names) for split in rows[names[0]]}
    return rows


def comparison_page(found: ModelComparison, pool: Pool, title: str, question: tuple[str, str]) -> Page:
    """Return the report.

    Args:
        found: the models and their scores.
        pool: with the results.
        title: of the protocol.
        question: the two models whose difference the summary states, the first minus the second.
    """
    rows = accuracies(found, pool)
    splits = list(next(iter(rows.values())))
    has_ood = len(splits) > 2
    columns = ["model", *(f"{split}, %" for split in splits), *(["OOD mean, %"] if has_ood else [])]
    cells = [
        [name, *(100 * row[split] for split in splits), *([100 * ood_mean(row)] if has_ood else [])]
        for name, row in rows.items()
    ]
    second = "OOD mean" if has_ood else "test"
    points = {
        name: [ChartPoint(name=name, x=100 * row["heldout"], y=100 * (ood_mean(row) if has_ood else row["test"]))]
        for name, row in rows.items()
    }
    one, two = (rows[name] for name in question)
    change = f"{100 * (one['test'] - two['test']):+.2f} points on test"
    change += f", {100 * (ood_mean(one) - ood_mean(two)):+.2f} OOD" if has_ood else ""
    return Page(
        title=title,
        subject="protocol",
        summary=f"{question[0]} against {question[1]}: {change} (one seed).",
        parts=[
            Table(
                title=f"{title}: accuracy",
                columns=columns,
                rows=cast(Any, cells),
                highlight=[list(rows).index(question[0])],
            ),
            Scatter(
                title="Held-out against OOD accuracy" if has_ood else "Held-out against test",
                x_label="held-out accuracy, %",
                y_label=f"{second} accuracy, %",
                groups=points,
            ),
        ],
        lineage={name: pool.ingredient(node.fingerprint).weights for name, node in found.models.items()},
    )
