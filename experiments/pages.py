"""A protocol's command repeated with other seeds, and its report pages put together: mean ± sd over the repeats."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from soups.reporting.page import Cell, Curves, Page, Table

ROOT = Path(__file__).parents[1]


def repeat(protocol: str, seeds: Sequence[int], output: Path, overrides: Callable[[int], list[str]]) -> list[Page]:
    """Run a protocol once a seed, through the command that a user types; finished nodes are found in its pool."""
    pages: list[Page] = []
    for seed in seeds:
        place = output.resolve() / f"seed-{seed}"
        command = [
            sys.executable, "train.py", f"+protocol={protocol}", f"pool.path={place / 'pool'}", f"paths.output={place}",
            "tracking=off", *overrides(seed),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
        newest = max(place.glob("protocols/*/page.json"), key=lambda path: path.stat().st_mtime)
        pages.append(Page.load(newest.parent))
    return pages


def tables(pages: Sequence[Page]) -> str:
    """Return every table of the pages as Markdown, its numbers as mean ± sd over the pages."""
    found: list[str] = []
    for number, part in enumerate(pages[0].parts):
        if not isinstance(part, Table):
            continue
        same = [page.parts[number] for page in pages]
        lines = ["| " + " | ".join(part.columns) + " |", "|" + "---|" * len(part.columns)]
        for row in range(len(part.rows)):
            columns = [[table.rows[row][column] for table in same] for column in range(len(part.columns))]  # type: ignore[union-attr]
            lines.append("| " + " | ".join(map(_cell, columns)) + " |")
        found.append(f"**{part.title}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(found)


def _cell(values: Sequence[object]) -> str:
    numbers = [value.value if isinstance(value, Cell) else value for value in values]
    if all(isinstance(value, int | float) for value in numbers):
        spread = statistics.stdev(numbers) if len(numbers) > 1 else float("nan")
        return f"{statistics.mean(numbers):.2f} ± {spread:.2f}"
    return "" if numbers[0] is None else str(numbers[0])


def curves(pages: Sequence[Page]) -> list[Curves]:
    """Return the pages' curves: means over the pages, in bands of one sd."""
    found: list[Curves] = []
    for number, part in enumerate(pages[0].parts):
        if not isinstance(part, Curves):
            continue
        same = [page.parts[number] for page in pages]
        means: dict[str, list[float | None]] = {}
        low: dict[str, list[float | None]] = {}
        high: dict[str, list[float | None]] = {}
        for name in part.series:
            columns = list(zip(*[one.series[name] for one in same], strict=True))  # type: ignore[union-attr]
            means[name] = [statistics.mean(values) for values in columns]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]
            low[name] = [mean - sd for mean, sd in zip(means[name], spread, strict=True)]
            high[name] = [mean + sd for mean, sd in zip(means[name], spread, strict=True)]
        found.append(part.model_copy(update={"series": means, "low": low, "high": high}))
    return found
