"""The folder of a finished soup: weights with their lineage, report, table, figures and page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soups.fitting.environment import versions
from soups.reporting import Decision, SoupReport, compare_members, draw_all, page_of, save_page, write_csv
from soups.reporting.report import Row
from soups.reporting.soup_report import Difference, Optimism, PathPoint
from soups.soup_making import comparisons, rows, warnings
from soups.soup_making.evaluator import HELDOUT
from soups.soup_making.predictions import Predictions
from soups.soup_making.surroundings import Surroundings
from soups.stores import write_safetensors
from soups.stores.files import replacing_folder, write_json
from soups.weights import hash_weights


@dataclass(frozen=True)
class Finished:
    """What was measured after selection; see `soups.reporting.SoupReport`."""

    predictions: Predictions
    rows: list[Row]
    path: list[PathPoint]
    differences: list[Difference]
    optimism: list[Optimism]
    diversity: dict[str, dict[str, float | None]]
    warnings: list[str]

    @classmethod
    def of(cls, predictions: Predictions) -> Finished:
        """Measure everything that the report shows."""
        return cls(
            predictions,
            rows.rows(predictions),
            rows.path(predictions),
            comparisons.differences(predictions),
            comparisons.optimism(predictions),
            comparisons.diversity(predictions),
            warnings.warnings(predictions),
        )


def write(
    finished: Finished,
    near: Surroundings,
    fingerprint: str,
    folder: Path,
    remarks: Sequence[str],
    seconds: Mapping[str, float],
) -> None:
    """Write the folder, whole or not at all.

    Args:
        finished: the soup and its numbers.
        near: what is known of the loss around it.
        fingerprint: of the soup.
        folder: to make or replace.
        remarks: the first of the report's warnings.
        seconds: by phase.
    """
    found = finished.predictions
    evaluator = found.evaluator
    lineage = _lineage(found)
    report = _report(finished, near, fingerprint, remarks, seconds)
    with replacing_folder(folder) as scratch:
        weights = found.selection.soup.weights
        write_safetensors(scratch / "soup.safetensors", weights, {"lineage": json.dumps(lineage)})
        write_json(scratch / "config.json", evaluator.run.configuration.plain())
        write_csv(report, scratch / "results.csv")
        draw_all(report, scratch)
        report.save(scratch)
        heatmaps = compare_members(evaluator.pool, found.ingredients, evaluator.digest(HELDOUT))
        save_page(page_of(report, found.ingredients, [*heatmaps, *near.parts]), scratch)


def _report(
    finished: Finished, near: Surroundings, fingerprint: str, remarks: Sequence[str], seconds: Mapping[str, float]
) -> SoupReport:
    found = finished.predictions
    evaluator, selection = found.evaluator, found.selection
    soup, sign = selection.soup, evaluator.sign
    by_short = {record.short: record for record in found.ingredients}
    steps = [
        Decision(
            name=step.name,
            own_score=sign * step.own_score,
            soup_score=sign * step.soup_score,
            to_reach=None if math.isinf(step.to_reach) else sign * step.to_reach,
            kept=step.kept,
            action=step.action,
            evaluated=step.evaluated,
        )
        for step in soup.steps or selection.soups["greedy"].steps
    ]
    return SoupReport(
        fingerprint=fingerprint,
        name=selection.recipe,
        settings=evaluator.run.configuration.plain(),
        versions=versions(),
        pool=evaluator.pool.url,
        metric=evaluator.metric,
        mode="max" if evaluator.metric == "accuracy" else "min",
        members=[by_short[short].fingerprint for short in soup.members],
        ingredients=[record.fingerprint for record in found.ingredients],
        splits={split: len(evaluator.labels(split)) for split in found.splits},
        rows=finished.rows,
        steps=steps,
        search=selection.recipe if soup.steps else "greedy",
        lineage=_lineage(found),
        seconds=dict(seconds),
        coefficients=soup.coefficients,
        by_tensor=soup.by_tensor,
        path=finished.path,
        path_label=soup.path_label,
        differences=finished.differences,
        optimism=finished.optimism,
        diversity=finished.diversity,
        evaluations=selection.evaluations,
        warnings=list(dict.fromkeys([*remarks, *finished.warnings, *near.warnings])),
        details=soup.details,
    )


def _lineage(found: Predictions) -> dict[str, Any]:
    """Return where the soup comes from: hashes, settings and versions."""
    evaluator, soup = found.evaluator, found.selection.soup
    options = {key: value for key, value in evaluator.options.section.items() if key not in ("foreign", "exclude")}
    by_short = {record.short: record for record in found.ingredients}
    return {
        "recipe": options,
        "start": found.ingredients[0].start,
        "split": evaluator.run.split,
        "soup": hash_weights(soup.weights),
        "members": [
            {"fingerprint": by_short[short].fingerprint, "weights": by_short[short].weights} for short in soup.members
        ],
        "coefficients": soup.coefficients,
        "heldout": evaluator.sign * soup.score,
        "model": evaluator.run.asked.model,
        "classes": list(evaluator.run.splits.classes),
        "versions": versions(),
        "pool": evaluator.pool.url,
    }
