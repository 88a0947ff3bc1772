"""The rows of the final table: every model's numbers on every split, with intervals and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from soups.evaluation import score
from soups.evaluation.statistics import right, wilson
from soups.reporting import differences, flatten
from soups.reporting.report import Row
from soups.reporting.soup_report import PathPoint, soup_name
from soups.soup_making.evaluator import SoupEvaluator
from soups.soup_making.predictions import Predictions
from soups.stores.pool import Ingredient


def rows(found: Predictions) -> list[Row]:
    """Return references, ingredients from the best to the worst, their mean, the best one, soups, and the ensemble."""
    evaluator, soups = found.evaluator, found.selection.soups
    notes, varied = _notes(found), varied_settings(found.ingredients)
    order = evaluator.best_first(found.ingredients)
    single = [
        _row(evaluator, record.short, "ingredient", found.of_ingredients[record.short],
             notes.get(record.short, "left out")).model_copy(update={"settings": varied.get(record.short, {})})
        for record in order
    ]  # fmt: skip
    average = Row(
        name="mean of ingredients",
        kind="mean",
        metrics={
            split: {
                "accuracy": _average([line.accuracy[split] for line in single]),
                "loss": _average([line.loss[split] for line in single]),
            }
            for split in found.splits
        },
    )
    best = single[0].model_copy(update={"name": "best single", "kind": "best", "note": single[0].name, "settings": {}})
    return [
        *(_row(evaluator, one.name, "start", found.of_references[one.name]) for one in found.references),
        *single,
        average,
        best,
        *(
            _row(evaluator, soup_name(name), "soup", found.of_soups[name], soup.note or f"{len(soup.members)} averaged")
            for name, soup in soups.items()
        ),
        _row(evaluator, "logit ensemble", "ensemble", found.ensemble(), f"{len(order)} models at inference"),
    ]


def varied_settings(ingredients: Sequence[Ingredient]) -> dict[str, dict[str, Any]]:
    """Return the settings in which ingredients differ, by short name; nothing of checkpoints made elsewhere.

    Keys are without their sections where that is enough to tell them apart.
    """
    ours = {record.short: record.determinants for record in ingredients if "training_version" in record.determinants}
    keys = [key for key in differences(ours)[0] if key not in ("start", "split")]
    last = [key.rpartition(".")[2] for key in keys]
    names = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
    flat = {name: flatten(determinants) for name, determinants in ours.items()}
    return {name: {names[key]: settings[key] for key in keys if key in settings} for name, settings in flat.items()}


def path(found: Predictions) -> list[PathPoint]:
    """Return the numbers of the points on the path of the soup that was asked for."""
    points: list[PathPoint] = []
    for point, values in zip(found.selection.soup.path, found.on_path, strict=True):
        numbers = _numbers(found.evaluator, values)
        accuracy = {split: one["accuracy"] for split, one in numbers.items()}
        loss = {split: one["loss"] for split, one in numbers.items()}
        points.append(PathPoint(position=point.position, accuracy=accuracy, loss=loss))
    return points


def _numbers(evaluator: SoupEvaluator, values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return accuracy in [0, 1] and loss in nats, by split."""
    numbers = {split: score(value, evaluator.labels(split)) for split, value in values.items()}
    return {split: {"accuracy": number.accuracy, "loss": number.loss} for split, number in numbers.items()}


def _row(evaluator: SoupEvaluator, name: str, kind: str, values: Mapping[str, Tensor], note: str = "") -> Row:
    intervals: dict[str, tuple[float, float]] = {}
    for split, value in values.items():
        labels = evaluator.labels(split)
        interval = wilson(int(right(value, labels).sum()), len(labels))
        intervals[split] = (interval.low, interval.high)
    return Row(name=name, kind=kind, note=note, interval=intervals, metrics=_numbers(evaluator, values))


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes(found: Predictions) -> dict[str, str]:
    """Say of each ingredient what became of it: in the greedy search, or its share in another recipe's soup."""
    recipe, soup, metric = found.selection.recipe, found.selection.soup, found.evaluator.metric
    if recipe not in ("greedy", "uniform") and not (recipe == "diwa" and soup.steps):
        if not soup.coefficients:
            return dict.fromkeys(soup.members, "merged")
        return {name: f"share {value:.3f}" for name, value in soup.coefficients.items()}
    notes: dict[str, str] = {}
    for number, step in enumerate(found.selection.soups["greedy"].steps):
        if step.kept:
            notes[step.name] = "kept: the best" if number == 0 else "kept"
        elif step.evaluated < 1:
            notes[step.name] = f"left out after {step.evaluated:.0%} of the held-out split"
        elif metric == "accuracy":
            notes[step.name] = f"left out: soup {100 * step.soup_score:.2f} < {100 * step.to_reach:.2f}"
        else:
            notes[step.name] = f"left out: soup loss {-step.soup_score:.4f} > {-step.to_reach:.4f}"
    return notes
