"""The page of a finished soup, made from its report and the records of its ingredients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soups.errors import StorageError
from soups.evaluation import ood_mean
from soups.evaluation.statistics import wilson
from soups.reporting.html import write_html
from soups.reporting.page import Cell, Curves, Matrix, Page, Part, Point, Scatter, Steps, Table
from soups.reporting.report import Report, Row, soup_name
from soups.reporting.table import summary_sentence
from soups.stores.pool import Ingredient, Pool


def page_of(report: Report, members: Sequence[Ingredient] = (), more: Sequence[Part] = ()) -> Page:
    """Return the page of a soup.

    Args:
        report: of the soup; parts that it has no data for are left out.
        members: records of the ingredients that were tried, for settings and training curves.
        more: further parts, shown after the curves.
    """
    parts: list[Part | None] = [
        _closing(report),
        _differences(report),
        _scatter(report),
        _path(report),
        _steps(report),
        _shares(report),
        _shares_by_tensor(report),
        _optimism(report),
        _diversity(report),
        _history(report, members, "heldout/accuracy", "Held-out accuracy while fine-tuning", "accuracy, %", 100.0),
        _history(report, members, "heldout/loss", "Held-out loss while fine-tuning", "cross-entropy, nats", 1.0),
        *more,
        _cost(report, members),
    ]
    versions = report.lineage.get("versions") or {}
    return Page(
        title=f"{soup_name(report.recipe, first=True)} of {len(report.ingredients)} ingredients",
        subject="soup",
        summary=summary_sentence(report),
        warnings=report.warnings,
        parts=[part for part in parts if part is not None],
        configs={record.short: record.determinants or record.config for record in members},
        lineage={key: value for key, value in report.lineage.items() if key != "versions"},
        environment={str(key): str(value) for key, value in versions.items()} | _layout(members),
    )


def save_page(page: Page, folder: Path) -> Path:
    """Write `page.json` and `report.html` into a folder; return the latter."""
    page.save(folder)
    path = folder / "report.html"
    write_html(page, path)
    return path


def read_page(folder: Path) -> Page:
    """Return the page of a finished folder: its `page.json`, or made from the `report.json` of an older soup.

    An older soup gets the settings and curves of its ingredients from its pool, as far as that is still there.

    Raises:
        StorageError: the folder holds neither, or it cannot be read.
    """
    if (folder / "page.json").is_file():
        return Page.load(folder)
    if not (folder / "report.json").is_file():
        raise StorageError(
            f"{folder} holds neither page.json nor report.json: name the folder of a soup or a protocol."
        )
    report = Report.load(folder)
    return page_of(report, _records(report))


def remake(folder: Path) -> Path:
    """Write `report.html` again from what a folder holds; return its path. See `read_page`."""
    page, path = read_page(folder), folder / "report.html"
    write_html(page, path)
    return path


def _records(report: Report) -> list[Ingredient]:
    url = str(report.lineage.get("pool") or "")
    if not url:
        return []
    pool = Pool(url)
    return [pool.ingredient(name) for name in report.ingredients if name in pool]


def _differences(report: Report) -> Table | None:
    if not report.differences:
        return None
    rows: list[list[Cell | float | int | str | None]] = [
        [
            f"{change.name} − {change.against}",
            _name(change.split),
            Cell(value=100 * change.value, low=100 * change.low, high=100 * change.high),
            change.p_value,
            change.test,
        ]
        for change in report.differences
    ]
    return Table(
        title="Soups against the best single model",
        note="On the same samples, in points, with 95 % intervals. The best single model was chosen on the held-out split.",
        columns=["models", "split", "difference, points", "p", "test"],
        rows=rows,
    )


def _path(report: Report) -> Curves | None:
    if len(report.path) < 2:
        return None
    series: dict[str, list[float | None]] = {
        _name(split): [100 * point.accuracy[split] for point in report.path] for split in report.splits
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


def _shares(report: Report) -> Table | None:
    """Return the shares of the members, where they are not all equal."""
    if len({round(value, 9) for value in report.coefficients.values()}) < 2:
        return None
    rows: list[list[Cell | float | int | str | None]] = [
        [name, 100 * value] for name, value in sorted(report.coefficients.items(), key=lambda item: -item[1])
    ]
    return Table(title="Shares in the soup", columns=["ingredient", "share, %"], rows=rows)


def _shares_by_tensor(report: Report) -> Matrix | None:
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


def _optimism(report: Report) -> Table | None:
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


def _diversity(report: Report) -> Table | None:
    if not report.diversity:
        return None
    measures = list(next(iter(report.diversity.values())))
    rows: list[list[Cell | float | int | str | None]] = [
        [_name(split), *(values[name] for name in measures)] for split, values in report.diversity.items()
    ]
    return Table(
        title="How differently the ingredients err",
        note="Means over pairs. Ratio of errors: different mistakes over equal ones. Q: 1 where both are right and wrong "
        "together, 0 where independent.",
        columns=["split", *measures],
        rows=rows,
    )


def _name(split: str) -> str:
    return "held-out" if split == "heldout" else split


def _percent(row: Row, split: str, count: int) -> Cell:
    value = row.accuracy[split]
    if row.kind == "mean" or not count:  # a mean of models is no share of samples
        return Cell(value=100 * value)
    interval = wilson(round(value * count), count)
    low, high = interval.low, interval.high
    return Cell(value=100 * value, low=100 * low, high=100 * high)


def _closing(report: Report) -> Table:
    has_ood = len(report.splits) > 2
    columns = ["model", *(f"{_name(split)}, %" for split in report.splits)]
    columns += (["OOD mean, %"] if has_ood else []) + ["loss, nats", "note"]
    rows: list[list[Cell | float | int | str | None]] = [
        [
            row.name,
            *(_percent(row, split, count) for split, count in report.splits.items()),
            *([100 * row.ood] if has_ood else []),
            row.loss.get("heldout"),
            row.note,
        ]
        for row in report.rows
    ]
    sizes = ", ".join(f"{_name(split)} {count}" for split, count in report.splits.items())
    return Table(
        title="Accuracy of every model",
        note=f"Samples: {sizes}. Intervals are 95 % (Wilson) for one model by itself; differences between models "
        f"measured on the same samples are surer than they suggest. Loss is on the held-out split. Selection saw the held-out split alone.",
        columns=columns,
        rows=rows,
        highlight=[number for number, row in enumerate(report.rows) if row.name == report.soup],
    )


def _scatter(report: Report) -> Scatter:
    has_ood = len(report.splits) > 2
    across, up = ("test", "OOD") if has_ood else ("heldout", "test")

    def point(row: Row) -> Point:
        details = {_name(split): f"{100 * value:.2f} %" for split, value in row.accuracy.items() if split != across}
        details |= {"": row.note} if row.note else {}
        y = row.ood if has_ood else row.accuracy["test"]
        return Point(name=row.name, x=100 * row.accuracy[across], y=100 * y, details=details)

    groups: dict[str, list[Point]] = {"in the soup": [], "left out": []}
    for row in report.rows:
        if row.kind == "ingredient":
            groups["in the soup" if report.kept(row.name) else "left out"].append(point(row))
    # The soup of the recipe gets the star, which is the fourth look; the best single model rings its ingredient.
    order = {"best": 0, "soup": 1, "ensemble": 2, "start": 3, "mean": 4}
    others = [row for row in report.rows if row.kind != "ingredient"]
    for row in sorted(others, key=lambda row: (order.get(row.kind, 5), row.name != report.soup)):
        groups[row.name] = [point(row)]
    return Scatter(
        title="In distribution against out of distribution" if has_ood else "Held-out against test",
        note="Each point is one model. Up and to the right is better.",
        x_label="test accuracy, %" if has_ood else "held-out accuracy, %",
        y_label=f"mean {up} accuracy, %" if has_ood else "test accuracy, %",
        groups={name: points for name, points in groups.items() if points},
    )


_ORDER = {
    "greedy": "Candidates join in the order of their own held-out score; one stays if the soup with it is no worse. ",
    "greedy_removal": "After the greedy search, members are taken out as long as that raises the score. ",
    "greedy_weights": "Each step adds the ingredient that helps most, also one that is in the soup already. ",
    "top_k": "Each step averages one candidate more, in the order of their own held-out score. ",
}


def _steps(report: Report) -> Steps | None:
    if not report.steps:
        return None
    scale, unit = (100.0, ", %") if report.metric == "accuracy" else (1.0, ", nats")
    kept = sum(step.kept for step in report.steps)
    return Steps(
        title="The search" if report.search != "greedy" else "The greedy search",
        note=f"{_ORDER.get(report.search, '')}{kept} of {len(report.steps)} stayed.",
        score_label=f"held-out {report.metric}{unit}",
        names=[f"without {step.name}" if step.action == "remove" else step.name for step in report.steps],
        scores=[scale * step.soup_score for step in report.steps],
        to_reach=[None if step.to_reach is None else scale * step.to_reach for step in report.steps],
        kept=[step.kept for step in report.steps],
    )


def _history(
    report: Report, members: Sequence[Ingredient], key: str, title: str, label: str, scale: float
) -> Curves | None:
    found: dict[str, dict[float, float]] = {}
    for record in members:
        points = {float(entry["epoch"]): scale * entry[key] for entry in record.history if key in entry}
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


def _cost(report: Report, members: Sequence[Ingredient]) -> Table | None:
    fits = [record.durations["total"] for record in members if "total" in record.durations]
    rows: list[list[Cell | float | int | str | None]] = []
    if fits:
        rows.append([f"fine-tuning, {len(fits)} ingredients", math.fsum(fits)])
    for name, seconds in report.seconds.items():
        rows.append([name, seconds])
    return Table(title="Cost", columns=["phase", "time, s"], rows=rows) if rows else None


def _layout(members: Sequence[Ingredient]) -> dict[str, str]:
    """Return what the fits ran on; several values where they differ. Names of hosts stay out of pages that are passed on."""
    found: Mapping[str, list[Any]] = {
        key: sorted({str(record.layout[key]) for record in members if key in record.layout})
        for key in ("accelerator", "strategy", "world_size", "threads")
    }
    return {key: ", ".join(values) for key, values in found.items() if values}
