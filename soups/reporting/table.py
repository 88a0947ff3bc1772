"""The closing table of a soup, on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.table import Table

from soups.reporting.report import Report, Row, soup_name
from soups.stores.files import write_text

_STYLE = {"soup": "bold", "best": "bold", "ensemble": "italic", "start": "dim", "ingredient": ""}


def columns(report: Report) -> list[str]:
    """Return the accuracy columns: held-out, test, each OOD split; the OOD mean follows when there are any."""
    return list(report.splits)


def tables(report: Report, width: int) -> list[Table]:
    """Return the closing table; in a terminal too narrow for it, two: the summary, and the OOD splits one by one.

    The best figure of each column is green, with the mean and the ensemble (several models at inference) not counted.
    """
    title = f"{soup_name(report.recipe, first=True)} of {len(report.ingredients)} ingredients: accuracy in %"
    splits = columns(report)
    if width >= 30 + 11 * (len(splits) + 1) + 30 or len(splits) <= 2:
        return [_table(report, title, splits, notes=True)]
    return [
        _table(report, title, splits[:2], notes=True),
        _table(report, "The same on each OOD split", splits[2:], notes=False),
    ]


def _table(report: Report, title: str, splits: list[str], notes: bool) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("model", no_wrap=True)
    for split in splits:
        name = {"heldout": "held-out"}.get(split, split)
        result.add_column(f"{name}\n[dim]n={report.splits[split]}", justify="right", no_wrap=True)
    has_ood = notes and len(report.splits) > 2
    if has_ood:
        result.add_column("OOD\n[dim]mean", justify="right", no_wrap=True)
    if notes:
        result.add_column("", overflow="fold")
    single = [row for row in report.rows if row.kind not in ("ensemble", "mean")]
    best = {split: max(row.accuracy[split] for row in single) for split in splits}
    best_ood = max((row.ood for row in single), default=0.0)
    kind = None
    for row in report.rows:
        if kind is not None and (row.kind == "ingredient") != (kind == "ingredient"):
            result.add_section()
        kind = row.kind
        cells = [_cell(row.accuracy[split], row in single and row.accuracy[split] == best[split]) for split in splits]
        if has_ood:
            cells.append(_cell(row.ood, row in single and row.ood == best_ood))
        result.add_row(row.name, *cells, *([row.note] if notes else []), style=_STYLE.get(row.kind, ""))
    return result


def _cell(value: float, best: bool) -> str:
    text = f"{100 * value:.2f}"
    return f"[green]{text}[/]" if best else text


def plain_rows(report: Report) -> tuple[list[str], list[list[str | float]]]:
    """Return header and rows of the closing table as plain values, accuracies in [0, 1]."""
    splits = columns(report)
    header = ["model", "kind", *(f"{split}_accuracy" for split in splits), "ood_accuracy"]
    header += [f"{split}_loss" for split in splits] + ["note"]

    def values(row: Row) -> list[str | float]:
        accuracies = [row.accuracy[split] for split in splits]
        return [row.name, row.kind, *accuracies, row.ood, *(row.loss[split] for split in splits), row.note]

    return header, [values(row) for row in report.rows]


def write_csv(report: Report, path: Path) -> None:
    """Write the closing table as CSV, atomically."""
    header, rows = plain_rows(report)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def summary_sentence(report: Report) -> str:
    """Return what happened in one sentence."""
    soup, best = report.row(report.soup), report.row("best single")
    kept = f"{len(report.members)} of {len(report.ingredients)} ingredients"
    start = f" with {report.coefficients['start']:.0%} of the start" if report.coefficients.get("start") else ""
    does = f"({report.details['method']}) merges" if "method" in report.details else "averages"
    sentence = (
        f"The {report.soup} {does} {kept}{start}: held-out {soup.accuracy['heldout']:.2%} against "
        f"{best.accuracy['heldout']:.2%} of the best single one, test {soup.accuracy['test']:.2%} against "
        f"{best.accuracy['test']:.2%}"
    )
    if len(report.splits) > 2:
        sentence += f", mean over the OOD splits {soup.ood:.2%} against {best.ood:.2%}"
    return sentence + "."
