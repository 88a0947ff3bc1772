"""WARM against its best member and its ensemble, over seeds.

    python -m experiments.warm.run                 three seeds, then tables and figures
    python -m experiments.warm.run --seeds 0 1 2 3 4

A seed is another split of the texts, other pairs, raters, swaps, orders and rates. Writes table.md and the figures beside
this file.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from experiments.pages import ROOT, curves, repeat, tables
from soups.reporting import draw_page
from soups.reporting.page import Page, Table
from soups.stores.files import write_text

HERE = Path(__file__).parent
PAIRS = (("WARM", "best single"), ("WARM", "ensemble"), ("WARM", "mean of members"))


def differences(pages: list[Page]) -> str:
    """Return what WARM gains or loses, mean ± sd of the differences within a seed, in points."""
    lines: list[str] = []
    tables_ = [part for page in pages for part in page.parts[:1] if isinstance(part, Table)]
    for share in dict.fromkeys(str(row[0]) for row in tables_[0].rows):
        for one, two in PAIRS:
            parts = []
            for label, column in (("ID", 3), ("OOD", 4), ("wrong labels reproduced", 6), ("best-of-N rating", 7)):
                found = []
                for table in tables_:
                    rows = {str(row[1]): row for row in table.rows if str(row[0]) == share}
                    found.append(float(rows[one][column]) - float(rows[two][column]))  # type: ignore[arg-type]
                spread = statistics.stdev(found) if len(found) > 1 else float("nan")
                parts.append(f"{label} {statistics.mean(found):+.2f} ± {spread:.2f}")
            lines.append(f"- {share} swapped, {one} − {two}: {', '.join(parts)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "warm")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    pages = repeat(
        "warm", arguments.seeds, arguments.output,
        lambda seed: [f"seed={seed}", f"data.split_seed={seed}", *arguments.overrides],
    )  # fmt: skip
    text = f"{tables(pages)}\nDifferences within a seed (mean ± sd over {len(pages)} seeds, points):\n\n{differences(pages)}"
    print(text)
    write_text(HERE / "table.md", text)
    draw_page(Page(title="WARM", subject="protocol", summary="", parts=list(curves(pages))), HERE)


if __name__ == "__main__":
    main()
