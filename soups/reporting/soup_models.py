"""The parts of a soup's page that show every model: the closing table and the scatter plot."""

from __future__ import annotations

from soups.evaluation.statistics import wilson
from soups.reporting.columns import Column, columns_of, metric_on_test, split_name
from soups.reporting.page import Cell, ChartPoint, Scatter, Table
from soups.reporting.report import Row
from soups.reporting.soup_report import SoupReport


def models(report: SoupReport) -> Table:
    """Return the closing table, with intervals where the numbers are shares of samples."""
    columns = columns_of(report)
    loss = [Column("loss", "heldout", "loss", "nats")] if report.classifies else []
    shown = [*columns, *loss]
    rows: list[list[Cell | float | int | str | None]] = [
        [row.name, *(_cell(row, column) for column in shown), row.note] for row in report.rows
    ]
    sizes = ", ".join(f"{split_name(split)} {count}" for split, count in report.splits.items() if count)
    samples = f"Samples: {sizes}. " if sizes else ""
    if report.classifies:
        note = (
            f"{samples}Intervals are 95 % (Wilson) for one model by itself; differences between models measured on the "
            f"same samples are surer than they suggest. Loss is on the held-out split. Selection saw the held-out split "
            f"alone."
        )
    else:
        better = "larger" if report.mode == "max" else "smaller"
        note = f"{samples}{report.metric} selected, {better} is better. Test metrics were measured after selection."
    return Table(
        title="Accuracy of every model" if report.classifies else "Metrics of every model",
        note=note,
        columns=[
            "model",
            *(f"{column.heading}, {column.unit}" if column.unit else column.heading for column in shown),
            "note",
        ],
        rows=rows,
        highlight=[number for number, row in enumerate(report.rows) if row.name == report.soup],
    )


def _cell(row: Row, column: Column) -> Cell | float | None:
    value = column.value(row)
    # A mean of models is no share of samples, and neither is a mean over splits.
    if value is None or column.metric != "accuracy" or column.unit != "%":
        return value
    if row.kind == "mean" or not column.samples:
        return Cell(value=value)
    interval = wilson(round(value * column.samples / column.scale), column.samples)
    return Cell(value=value, low=100 * interval.low, high=100 * interval.high)


def scatter(report: SoupReport) -> Scatter | None:
    """Return every model as a point: test against OOD, or held-out against test where there is no OOD split."""
    columns = columns_of(report)
    test = metric_on_test(report)
    if report.classifies and len(report.splits) > 2:
        x, y = next(column for column in columns if column.split == "test"), columns[-1]
        title, labels = "In distribution against out of distribution", ("test accuracy, %", "mean OOD accuracy, %")
    elif report.classifies:
        x, y = columns[:2]
        title, labels = "Held-out against test", ("held-out accuracy, %", "test accuracy, %")
    elif test is not None and sum(row.value("test", test) is not None for row in report.rows) > 1:
        x, y = columns[:2]
        title, labels = "Held-out against test", (report.metric, test)
    else:
        return None

    def point(row: Row) -> ChartPoint | None:
        across, up = x.value(row), y.value(row)
        if across is None or up is None:
            return None
        details = {
            column.heading: f"{column.text(value)} {column.unit}".rstrip()
            for column in columns
            if column not in (x, y) and (value := column.value(row)) is not None
        }
        return ChartPoint(name=row.name, x=across, y=up, details=details | ({"": row.note} if row.note else {}))

    groups: dict[str, list[Row]] = {"in the soup": [], "left out": []}
    for row in report.rows:
        if row.kind == "ingredient":
            groups["in the soup" if report.kept(row.name) else "left out"].append(row)
    # The soup of the recipe gets the star, which is the fourth look; the best single model rings its ingredient.
    order = {"best": 0, "soup": 1, "ensemble": 2, "start": 3, "mean": 4}
    others = [row for row in report.rows if row.kind != "ingredient"]
    for row in sorted(others, key=lambda row: (order.get(row.kind, 5), row.name != report.soup)):
        groups[row.name] = [row]
    found = {name: [made for row in rows if (made := point(row))] for name, rows in groups.items()}
    better = "Up and to the right" if report.classifies or report.mode == "max" else "Down and to the left"
    return Scatter(
        title=title,
        note=f"Each point is one model. {better} is better.",
        x_label=labels[0],
        y_label=labels[1],
        groups={name: points for name, points in found.items() if points},
    )
