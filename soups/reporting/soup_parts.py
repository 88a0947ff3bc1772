"""The parts of a soup's page about its search and its ingredients, from the report and the records of the ingredients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from soups.evaluation import ood_mean
from soups.reporting.columns import split_name
from soups.reporting.page import Cell, Curves, Matrix, Steps, Table
from soups.reporting.soup_report import SoupReport
from soups.stores.pool import Ingredient


def differences(report: SoupReport) -> Table | None:
    """Return how the soups differ from the best single model on the same samples."""
    if not report.differences:
        return None
    best = report.row("best single").metrics
    rows: list[list[Cell | float | int | str | None]] = []
    for change in report.differences:
        if report.row(change.name).metrics == best:  # the same weights: there is nothing to estimate
            found: list[Cell | float | int | str | None] = [None, None, "identical"]
        else:
            interval = Cell(value=100 * change.value, low=100 * change.low, high=100 * change.high)
            found = [interval, change.p_value, change.test]
        rows.append([f"{change.name} − {change.against}", split_name(change.split), *found])
    return Table(
        title="Soups against the best single model",
        note="On the same samples, in points, with 95 % intervals. The best single model was chosen on the held-out split.",
        columns=["models", "split", "difference, points", "p", "test"],
        rows=rows,
    )


def path(report: SoupReport) -> Curves | None:
    """Return the accuracies along a path that was searched."""
    if len(report.path) < 2:
        return None
    series: dict[str, list[float | None]] = {
        split_name(split): [100 * point.accuracy[split] for point in report.path] for split in report.splits
    }
    if len(report.splits) > 2:
        series["OOD mean"] = [100 * ood_mean(point.accuracy) for point in report.path]
    return Curves(
        title="Along the path",
        note="Every point was evaluated after the held-out split had chosen one of them.",
        x_label=report.path_label,
        y_label="accuracy, %",
        x=[point.position for point in report.path],
        series=series,
    )


def shares(report: SoupReport) -> Table | None:
    """Return the shares of the members, where they are not all equal."""
    if len({round(value, 9) for value in report.coefficients.values()}) < 2:
        return None
    rows: list[list[Cell | float | int | str | None]] = [
        [name, 100 * value] for name, value in sorted(report.coefficients.items(), key=lambda item: -item[1])
    ]
    return Table(title="Shares in the soup", columns=["ingredient", "share, %"], rows=rows)


def shares_by_tensor(report: SoupReport) -> Matrix | None:
    """Return the shares of the ingredients by tensor, where they differ between tensors."""
    if not report.by_tensor:
        return None
    names = list(report.coefficients)
    return Matrix(
        title="Shares by tensor",
        row_labels=list(report.by_tensor),
        column_labels=names,
        values=[[100 * shares[name] for name in names] for shares in report.by_tensor.values()],
        value_label="share, %",
    )


def optimism(report: SoupReport) -> Table | None:
    """Return how much choosing on the held-out split flattered the choices."""
    if not report.optimism:
        return None
    scale, unit = (100.0, "points") if report.metric == "accuracy" else (1.0, "nats")
    rows: list[list[Cell | float | int | str | None]] = [
        [
            effect.name,
            Cell(value=scale * effect.value, low=scale * effect.low, high=scale * effect.high),
            effect.samples,
            effect.note,
        ]
        for effect in report.optimism
    ]
    return Table(
        title="What choosing did to the held-out score",
        note="Reported minus true, estimated by choosing again on random halves of the held-out split; the whole split "
        "flatters less. The interval holds 95 % of the halves.",
        columns=["choice", f"too good by, {unit}", "samples", "note"],
        rows=rows,
    )


def diversity(report: SoupReport) -> Table | None:
    """Return how differently the ingredients err."""
    if not report.diversity:
        return None
    measures = list(next(iter(report.diversity.values())))
    rows: list[list[Cell | float | int | str | None]] = [
        [split_name(split), *(values[name] for name in measures)] for split, values in report.diversity.items()
    ]
    return Table(
        title="How differently the ingredients err",
        note="Means over pairs. Ratio of errors: different mistakes over equal ones. Q: 1 where both are right and wrong "
        "together, 0 where independent.",
        columns=["split", *measures],
        rows=rows,
    )


_ORDER = {
    "greedy": "Candidates join in the order of their own held-out score; one stays if the soup with it is no worse. ",
    "greedy_removal": "After the greedy search, members are taken out as long as that raises the score. ",
    "greedy_weights": "Each step adds the ingredient that helps most, also one that is in the soup already. ",
    "top_k": "Each step averages one candidate more, in the order of their own held-out score. ",
}


def steps(report: SoupReport) -> Steps | None:
    """Return the decisions of the search."""
    if not report.steps:
        return None
    scale, unit = scale_of(report)
    kept = sum(step.kept for step in report.steps)
    return Steps(
        title="The search" if report.search != "greedy" else "The greedy search",
        note=f"{_ORDER.get(report.search, '')}{kept} of {len(report.steps)} stayed.",
        score_label=f"held-out {report.metric}{unit}" if report.classifies else report.metric,
        names=[f"without {step.name}" if step.action == "remove" else step.name for step in report.steps],
        scores=[scale * step.soup_score for step in report.steps],
        to_reach=[None if step.to_reach is None else scale * step.to_reach for step in report.steps],
        kept=[step.kept for step in report.steps],
    )


def scale_of(report: SoupReport) -> tuple[float, str]:
    """Return by how much scores in the selecting metric are multiplied when they are shown, and their unit."""
    if not report.classifies:
        return 1.0, ""
    return (100.0, ", %") if report.metric == "accuracy" else (1.0, ", nats")


def histories(report: SoupReport, members: Sequence[Ingredient]) -> list[Curves | None]:
    """Return the curves of the ingredients' fits, as far as they were recorded."""
    if not report.classifies:
        label = report.metric
        return [_history(report, members, label, label, f"{label} while fine-tuning", label, 1.0)]
    accuracy = _history(
        report, members, "heldout/accuracy", "accuracy", "Held-out accuracy while fine-tuning", "accuracy, %", 100.0
    )
    loss = _history(
        report, members, "heldout/loss", "loss", "Held-out loss while fine-tuning", "cross-entropy, nats", 1.0
    )
    return [accuracy, loss]


def _history(
    report: SoupReport,
    members: Sequence[Ingredient],
    key: str,
    metric: str,
    title: str,
    label: str,
    scale: float,
) -> Curves | None:
    found: dict[str, dict[float, float]] = {}
    starts = [row for row in report.rows if row.kind == "start"]
    start = starts[-1].value("heldout", metric) if starts else None
    for record in members:
        points = {float(entry["epoch"]): scale * entry[key] for entry in record.history if key in entry}
        if record.history and metric in (final := record.metrics.get("heldout", {})):
            # A fit that measures nothing on its way still has a score at its end.
            last = max(float(entry["epoch"]) for entry in record.history)
            points.setdefault(last, scale * final[metric])
        if len(points) == 1 and start is not None:  # and one at its beginning
            points = {0.0: scale * start, **points}
        if points:
            found[record.short] = points
    epochs = sorted({epoch for points in found.values() for epoch in points})
    if len(epochs) < 2:
        return None
    order = [step.name for step in report.steps]
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return Curves(
        title=title,
        note="One line for each ingredient, in the order of their held-out score.",
        x_label="epochs",
        y_label=label,
        x=epochs,
        series={name: [found[name].get(epoch) for epoch in epochs] for name in names},
    )


def cost(report: SoupReport, members: Sequence[Ingredient]) -> Table | None:
    """Return how long the fits, the search and the evaluation took."""
    fits = [record.durations["total"] for record in members if "total" in record.durations]
    rows: list[list[Cell | float | int | str | None]] = []
    if fits:
        rows.append([f"fine-tuning, {len(fits)} ingredients", math.fsum(fits)])
    for name, seconds in report.seconds.items():
        rows.append([name, seconds])
    return Table(title="Cost", columns=["phase", "time, s"], rows=rows) if rows else None
