"""Rewarded soups between two rewards, over seeds.

    python -m experiments.rewarded_soups.run              three seeds (about 4 CPU-minutes each), then table and figure

A seed is another split of the texts, other choices and orders. Writes table.md and front.png beside this file.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from experiments.pages import ROOT, repeat, tables
from soups.reporting import draw_page
from soups.reporting.page import ChartPoint, Page, Scatter, Table
from soups.stores.files import write_text

HERE = Path(__file__).parent


def margins(pages: list[Page]) -> str:
    """Return how far each interpolation is above the line and MORL, mean ± sd of the λ-weighted reward."""
    found: dict[str, dict[str, list[float]]] = {}
    for page in pages:
        table = page.parts[0]
        assert isinstance(table, Table)
        for row in table.rows:
            share = row[1]
            for label, column in (("line", 4), ("MORL", 6)):
                if isinstance(share, float) and row[column] is not None:
                    own, other = (
                        share * float(row[at]) + (1 - share) * float(row[at + 1])  # type: ignore[arg-type]
                        for at in (2, column)
                    )
                    found.setdefault(str(row[0]), {}).setdefault(label, []).append(own - other)
    lines: list[str] = []
    for name, by_label in found.items():
        parts = [
            f"soup − {label} {statistics.mean(values):+.3f} ± {statistics.stdev(values) if len(values) > 1 else float('nan'):.3f}"
            for label, values in by_label.items()
        ]
        lines.append(f"- {name}: {', '.join(parts)}")
    return "\n".join(lines) + "\n"


def front(pages: list[Page]) -> Scatter:
    """Return the fronts of all seeds in one figure."""
    groups: dict[str, list[ChartPoint]] = {}
    for seed, page in enumerate(pages):
        part = next(part for part in page.parts if isinstance(part, Scatter))
        for name, points in part.groups.items():
            groups[f"{name}, seed {seed}"] = points
    first = next(part for part in pages[0].parts if isinstance(part, Scatter))
    connect = [name for name in groups if name.startswith(tuple(first.connect))]
    return first.model_copy(update={"title": "Front", "groups": groups, "connect": connect})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "rewarded_soups")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    pages = repeat(
        "rewarded_soups", arguments.seeds, arguments.output,
        lambda seed: [f"seed={seed}", f"protocol.split_seed={seed}", *arguments.overrides],
    )  # fmt: skip
    text = (
        f"{tables(pages)}\nλ-weighted reward within a seed (mean ± sd over {len(pages)} seeds, standard deviations of a "
        f"reward):\n\n{margins(pages)}\n"
        + "\n".join(f"- seed {n}: {page.summary}" for n, page in enumerate(pages))
        + "\n"
    )
    print(text)
    write_text(HERE / "table.md", text)
    draw_page(Page(title="Rewarded soups", subject="protocol", summary="", parts=[front(pages)]), HERE)


if __name__ == "__main__":
    main()
