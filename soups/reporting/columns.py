"""Which numbers of a soup's report are shown, in their order: the columns of the table on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from soups.reporting.report import Row
from soups.reporting.soup_report import SoupReport

# What a metric of one split is called on another: val/acc, valid_acc and validation/acc become test/acc.
_HELDOUT, _TEST = ("validation", "valid", "val", "heldout", "dev"), "test"


@dataclass(frozen=True)
class Column:
    """One metric on one split.

    Attributes:
        heading: of the column, without its unit.
        unit: "%", "nats" or none.
        scale: shown values are this times the recorded ones.
        better: "max" or "min" where it is known which values are better.
        split, metric: of the values; metric is None for the mean over the OOD splits.
        samples: of the split; 0 where that is not known.
    """

    heading: str
    split: str
    metric: str | None
    unit: str = ""
    scale: float = 1.0
    better: Literal["max", "min"] | None = None
    samples: int = 0

    def value(self, row: Row) -> float | None:
        """Return the shown value of a row; None where it was not measured."""
        found = row.ood if self.metric is None else row.value(self.split, self.metric)
        return None if found is None or math.isnan(found) else self.scale * found

    def best(self, rows: list[Row]) -> float | None:
        """Return the best shown value among rows; None where nobody knows which is better."""
        values = [value for row in rows if (value := self.value(row)) is not None]
        choose: Callable[[list[float]], float] = max if self.better == "max" else min
        return choose(values) if values and self.better else None

    def text(self, value: float | None) -> str:
        """Return a shown value for people."""
        if value is None:
            return ""
        if self.unit == "%":
            return f"{value:.2f}"
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def split_name(split: str) -> str:
    """Return what people are shown for a split."""
    return "held-out" if split == "heldout" else split


def columns_of(report: SoupReport) -> list[Column]:
    """Return the columns of a report's closing table.

    Classifiers: accuracy on every split and its OOD mean. Other programs: the metric that selected, the same on test, then
    every other metric that they log.
    """
    if report.classifies:
        found = [
            Column(split_name(split), split, "accuracy", "%", 100.0, "max", count)
            for split, count in report.splits.items()
        ]
        return [*found, Column("OOD mean", "OOD", None, "%", 100.0, "max")] if len(report.splits) > 2 else found
    test = metric_on_test(report)
    first = [Column(report.metric, "heldout", report.metric, better=report.mode, samples=report.splits["heldout"])]
    if test is not None:
        first.append(Column(test, "test", test, better=report.mode, samples=report.splits["test"]))
    shown = {(column.split, column.metric) for column in first}
    others = dict.fromkeys(
        (split, name) for row in report.rows for split, values in row.metrics.items() for name in values
    )
    return first + [
        Column(name, split, name, samples=report.splits.get(split, 0))
        for split, name in sorted(others, key=lambda pair: list(report.splits).index(pair[0]))
        if (split, name) not in shown
    ]


def metric_on_test(report: SoupReport) -> str | None:
    """Return the test metric that answers to the one that selected, or None.

    It is the one of the same name, or of the name with "val" replaced by "test".
    """
    logged = dict.fromkeys(name for row in report.rows for name in row.metrics.get("test", {}))
    wanted = [report.metric, *(report.metric.replace(word, _TEST) for word in _HELDOUT if word in report.metric)]
    return next((name for name in wanted if name in logged), None)
