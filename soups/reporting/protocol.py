"""A page on the terminal and as figures: its tables as rich ones, its curves and scatters as PNG files."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from soups.reporting.page import Cell, Curves, Page, Scatter, Table, p_value_text
from soups.stores.files import replacing

# Okabe–Ito colours, and markers for print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
_MARKERS = "os^D*Pvx"


def page_tables(page: Page) -> list[RichTable]:
    """Return the page's tables for a terminal."""
    tables: list[RichTable] = []
    for part in page.parts:
        if isinstance(part, Table):
            table = RichTable(
                title=Text(part.title),
                caption=Text(part.note) if part.note else None,
                box=SIMPLE_HEAD,
                pad_edge=False,
                collapse_padding=True,
            )
            for place, column in enumerate(part.columns):
                # Headings take several lines, so that numbers and names keep theirs on a narrow terminal.
                heading = "\n".join(
                    wrap(column, width=max(map(len, column.split()), default=1), break_on_hyphens=False)
                )
                words = [row[place] for row in part.rows if isinstance(row[place], str)]
                names = place == 0 or bool(words)
                short = max((len(str(word)) for word in words), default=0) <= 24
                table.add_column(Text(heading), justify="left" if names else "right", no_wrap=names and short)
            for number, row in enumerate(part.rows):
                texts = [
                    Text(p_value_text(cell) if heading == "p" and isinstance(cell, float) else cell_text(cell))
                    for heading, cell in zip(part.columns, row, strict=True)
                ]
                table.add_row(*texts, style="bold" if number in part.highlight else None)
            tables.append(table)
    return tables


def cell_text(value: Cell | float | int | str | None) -> str:
    """Return a table's value for people.

    >>> cell_text(Cell(value=1.25, low=1.0, high=1.5)), cell_text(None), cell_text(81.256), cell_text(3)
    ('1.25 [1.00, 1.50]', '', '81.26', '3')
    """
    if value is None:
        return ""
    if isinstance(value, Cell):
        interval = f" [{value.low:.2f}, {value.high:.2f}]" if value.low is not None and value.high is not None else ""
        return f"{value.value:.2f}{interval}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def draw_page(page: Page, folder: Path) -> dict[str, Path]:
    """Draw the page's curves and scatters into a folder; return their files by name."""
    drawn: dict[str, Path] = {}
    for part in page.parts:
        if not isinstance(part, Curves | Scatter):
            continue
        # The object interface: a figure of our own, whatever backend or state the user's pyplot is in.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.add_subplot()
        _curves(part, axes) if isinstance(part, Curves) else _scatter(part, axes)
        axes.set(title=part.title, xlabel=part.x_label, ylabel=part.y_label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        name = re.sub(r"[^a-z0-9]+", "_", part.title.lower()).strip("_")
        drawn[name] = folder / f"{name}.png"
        with replacing(drawn[name]) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    return drawn


def _curves(part: Curves, axes: Any) -> None:
    for number, (name, values) in enumerate(part.series.items()):
        colour, marker = _COLOURS[number % 8], _MARKERS[number % 8]
        points = [(x, y) for x, y in zip(part.x, values, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.4, label=name)
        low, high = part.low.get(name), part.high.get(name)
        if low and high:
            bounds = [(x, a, b) for x, a, b in zip(part.x, low, high, strict=True) if a is not None and b is not None]
            axes.fill_between(*zip(*bounds, strict=True), color=colour, alpha=0.15, lw=0)
    if part.log_x:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for x in part.x):
        axes.locator_params(axis="x", integer=True)


def _scatter(part: Scatter, axes: Any) -> None:
    for number, (name, points) in enumerate(part.groups.items()):
        again = number // 8  # more groups than colours: another marker, and hollow
        axes.plot(
            [point.x for point in points], [point.y for point in points], color=_COLOURS[number % 8],
            linestyle="-" if name in part.connect else "none", marker=_MARKERS[(number + 3 * again) % 8],
            fillstyle="none" if again % 2 else "full", ms=6, label=name,
        )  # fmt: skip
