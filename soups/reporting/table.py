"""The closing table of a soup, on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from soups.reporting.columns import Column, columns_of, metric_on_test
from soups.reporting.report import Row
from soups.reporting.soup_report import SoupReport, soup_name
from soups.stores.files import write_text

_STYLE = {"soup": "bold", "best": "bold", "ensemble": "italic", "start": "dim", "ingredient": ""}
# Characters of a line: borders of a column, and a column of notes that is still read with ease.
_BORDER, _NOTES = 3, 30
# Headings longer than this take several lines.
_HEADING = 12


def tables(report: SoupReport, width: int) -> list[Table]:
    """Return the closing table; in a terminal too narrow for it, several with some of the columns each.

    The first holds the metric that selected, and the notes. The best figure of a column is green where it is known which
    figures are better; the mean and the ensemble (several models at inference) are not counted.

    Args:
        report: of the soup.
        width: of the terminal, in characters.
    """
    columns = columns_of(report)
    names = max(len(row.name) for row in report.rows)
    free = width - names - _BORDER - 1
    widths = [_width(column, report.rows) + _BORDER for column in columns]
    wanted = min(_NOTES, max((len(row.note) for row in report.rows), default=0)) + _BORDER
    parts = [columns] if sum(widths) + wanted <= free else _divided(columns, widths, free, wanted)
    title = f"{soup_name(report.recipe, first=True)} of {len(report.ingredients)} ingredients"
    titles = [f"{title}: {_described(report)}", *[f"{title}, continued"] * (len(parts) - 1)]
    return [
        _table(report, heading, part, notes=number == 0)
        for number, (heading, part) in enumerate(zip(titles, parts, strict=True))
    ]


def _described(report: SoupReport) -> str:
    if report.classifies:
        return "accuracy in %"
    return f"selected by {report.metric}, {'larger' if report.mode == 'max' else 'smaller'} is better"


def _width(column: Column, rows: Sequence[Row]) -> int:
    cells = max((len(column.text(column.value(row))) for row in rows), default=0)
    return max(cells, min(len(column.heading), _HEADING), len(_samples(column)))


def _samples(column: Column) -> str:
    return f"n={column.samples}" if column.samples else ""


def _divided(columns: Sequence[Column], widths: Sequence[int], free: int, notes: int) -> list[list[Column]]:
    """Share columns out among tables that fit: the first beside the notes, with two columns at most."""
    parts: list[list[Column]] = [[]]
    left = free - notes
    for column, width in zip(columns, widths, strict=True):
        full = len(parts) == 1 and len(parts[0]) == 2
        if parts[-1] and (width > left or full):
            parts.append([])
            left = free
        parts[-1].append(column)
        left -= width
    return parts


def _table(report: SoupReport, title: str, columns: Sequence[Column], notes: bool) -> Table:
    result = Table(title=Text(title), title_justify="left")
    result.add_column("model", no_wrap=True)
    for column in columns:
        width = _width(column, report.rows)
        heading = Text(_folded(column.heading, width))
        if column.samples:
            heading.append(f"\nn={column.samples}", style="dim")
        result.add_column(heading, justify="right", no_wrap=True, min_width=width)
    if notes:
        result.add_column("", overflow="fold")
    single = [row for row in report.rows if row.kind not in ("ensemble", "mean")]
    best = [column.best(single) for column in columns]
    kind = None
    for row in report.rows:
        if kind is not None and (row.kind == "ingredient") != (kind == "ingredient"):
            result.add_section()
        kind = row.kind
        values = [column.value(row) for column in columns]
        cells = [
            Text(column.text(value), "green" if row in single and value is not None and value == top else "")
            for column, value, top in zip(columns, values, best, strict=True)
        ]
        result.add_row(Text(row.name), *cells, *([_remarks(row)] if notes else []), style=_STYLE.get(row.kind, ""))
    return result


def _remarks(row: Row) -> Text:
    """Return a row's note, and below it the settings in which an ingredient differs from the others."""
    text = Text(row.note)
    if row.settings:
        varied = ", ".join(f"{key} {_short(value)}" for key, value in row.settings.items())
        text.append(f"{chr(10) if row.note else ''}{varied}", style="dim")
    return text


def _short(value: Any) -> str:
    """Return a setting in few characters.

    >>> _short(0.000123456), _short(7), _short(None)
    ('0.000123', '7', 'null')
    """
    if value is None:
        return "null"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _folded(heading: str, width: int) -> str:
    """Return a heading in lines of at most `width` characters, cut after "/", "_" or a space where there is one.

    >>> _folded("val/precision_macro", 12)
    'val/\\nprecision_\\nmacro'
    """
    if len(heading) <= width:
        return heading
    words = [""]
    for letter in heading:
        words[-1] += letter
        if letter in "/_ -.":
            words.append("")
    lines = [""]
    for word in words:
        pieces = [word[place : place + width] for place in range(0, len(word), width)]
        for piece in pieces:
            if lines[-1] and len(lines[-1]) + len(piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip(" ") for line in lines)


def plain_rows(report: SoupReport) -> tuple[list[str], list[list[str | float]]]:
    """Return header and rows of the closing table as plain values, accuracies in [0, 1]."""
    if not report.classifies:
        columns = columns_of(report)
        header = ["model", "kind", *(f"{column.split}:{column.metric}" for column in columns), "note"]
        return header, [
            [row.name, row.kind, *(_blank(column.value(row)) for column in columns), row.note] for row in report.rows
        ]
    splits = list(report.splits)
    header = ["model", "kind", *(f"{split}_accuracy" for split in splits), "ood_accuracy"]
    header += [f"{split}_loss" for split in splits] + ["note"]

    def values(row: Row) -> list[str | float]:
        accuracies = [row.accuracy[split] for split in splits]
        return [row.name, row.kind, *accuracies, row.ood, *(row.loss[split] for split in splits), row.note]

    return header, [values(row) for row in report.rows]


def _blank(value: float | None) -> str | float:
    return "" if value is None else value


def write_csv(report: SoupReport, path: Path) -> None:
    """Write the closing table as CSV, atomically."""
    header, rows = plain_rows(report)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary_sentence(report: SoupReport) -> str:
    """Return what happened in one sentence."""
    soup, best = report.row(report.soup), report.row("best single")
    kept = f"{len(report.members)} of {len(report.ingredients)} ingredients"
    start = f" with {report.coefficients['start']:.0%} of the start" if report.coefficients.get("start") else ""
    does = f"({report.details['method']}) merges" if "method" in report.details else "averages"
    opening = f"The {report.soup} {does} {kept}{start}"
    if not report.classifies:
        return f"{opening}: {_compared(report, soup, best)}."
    sentence = (
        f"{opening}: held-out {soup.accuracy['heldout']:.2%} against "
        f"{best.accuracy['heldout']:.2%} of the best single one, test {soup.accuracy['test']:.2%} against "
        f"{best.accuracy['test']:.2%}"
    )
    if len(report.splits) > 2:
        sentence += f", mean over the OOD splits {soup.ood:.2%} against {best.ood:.2%}"
    return sentence + "."


def _compared(report: SoupReport, soup: Row, best: Row) -> str:
    pairs = [("heldout", report.metric)] + ([("test", name)] if (name := metric_on_test(report)) else [])
    texts: list[str] = []
    for number, (split, metric) in enumerate(pairs):
        own, other = soup.value(split, metric), best.value(split, metric)
        if own is None or other is None:
            continue
        whose = " of the best single one" if number == 0 else ""
        texts.append(f"{metric} {own:.4f} against {other:.4f}{whose}")
    better = "larger" if report.mode == "max" else "smaller"
    return ", ".join(texts) + f" ({better} is better)"
