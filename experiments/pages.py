"""A protocol's command repeated with other seeds, and its report pages put together: mean ± sd over the repeats."""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from soups.reporting import draw_page
from soups.reporting.page import Cell, ChartPoint, Curves, Page, Scatter, Table
from soups.stores.files import write_text

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
        return _spread(numbers)
    return "" if numbers[0] is None else str(numbers[0])


def _spread(numbers: Sequence[float], sign: str = "") -> str:
    """Return mean ± sd; of a single number, the number."""
    mean = f"{statistics.mean(numbers):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


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
            means[name] = [None if None in values else statistics.mean(values) for values in columns]
            spread = [statistics.stdev(values) if len(values) > 1 and None not in values else 0.0 for values in columns]
            bands = list(zip(means[name], spread, strict=True))
            low[name] = [None if mean is None else mean - sd for mean, sd in bands]
            high[name] = [None if mean is None else mean + sd for mean, sd in bands]
        found.append(part.model_copy(update={"series": means, "low": low, "high": high}))
    return found


def differences(pages: Sequence[Page], pairs: Sequence[tuple[str, str]], part: int = 0) -> str:
    """Return what one row of a table gains or loses against another, mean ± sd of the differences within a seed."""
    lines: list[str] = []
    found = [page.parts[part] for page in pages]
    tables_ = [table for table in found if isinstance(table, Table)]
    for one, two in pairs:
        cells: list[str] = []
        for number, column in enumerate(tables_[0].columns[1:], 1):
            changes = []
            for table in tables_:
                rows = {str(row[0]): row[number] for row in table.rows}
                first, second = rows[one], rows[two]
                if isinstance(first, int | float) and isinstance(second, int | float):
                    changes.append(first - second)
            if len(changes) == len(tables_):
                cells.append(f"{column.removesuffix(', %')} {_spread(changes, '+')}")
        lines.append(f"- {one} − {two}: {', '.join(cells)}")
    return "\n".join(lines) + "\n"


def write_results(pages: Sequence[Page], seeds: Sequence[int], path: Path, part: int = 0) -> None:
    """Write a table of all pages as CSV, one row a seed, model and column."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "model", "column", "value"])
        for seed, page in zip(seeds, pages, strict=True):
            table = page.parts[part]
            assert isinstance(table, Table)
            for row in table.rows:
                for column, value in zip(table.columns[1:], row[1:], strict=True):
                    if isinstance(value, int | float):
                        writer.writerow([seed, row[0], column, value])


def scatter(pages: Sequence[Page]) -> list[Scatter]:
    """Return the pages' scatters as one each: the mean of every group over the pages."""
    found: list[Scatter] = []
    for number, part in enumerate(pages[0].parts):
        if not isinstance(part, Scatter):
            continue
        same = [page.parts[number] for page in pages]
        groups: dict[str, list[ChartPoint]] = {}
        for name in part.groups:
            points = [one.groups[name][0] for one in same]  # type: ignore[union-attr]
            x, y = (statistics.mean(getattr(point, axis) for point in points) for axis in ("x", "y"))
            groups[name] = [ChartPoint(name=name, x=x, y=y)]
        found.append(part.model_copy(update={"groups": groups}))
    return found


def study(
    protocol: str,
    here: Path,
    pairs: Sequence[tuple[str, str]],
    draw: Callable[[Sequence[Page]], Sequence[Curves | Scatter]],
    output: str,
    description: str | None,
) -> None:
    """Repeat a protocol as the command line says, and write table.md, results.csv and the figures of `draw` into `here`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / output)
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    pages = repeat(protocol, arguments.seeds, arguments.output, lambda seed: [f"seed={seed}", *arguments.overrides])
    text = f"{tables(pages)}\nDifferences within a seed (mean ± sd over {len(pages)} seeds):\n\n{differences(pages, pairs)}"
    print(text)
    write_text(here / "table.md", text)
    write_results(pages, arguments.seeds, here / "results.csv")
    draw_page(Page(title=protocol, subject="protocol", summary="", parts=list(draw(pages))), here)
