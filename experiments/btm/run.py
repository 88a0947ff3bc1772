"""Branch-Train-Merge: does it need the seed phase, and what do its averages cost against its ensemble, over seeds.

    python -m experiments.btm.run                 three seeds, then the table and the figure
    python -m experiments.btm.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.pages import ROOT, curves, differences, repeat, tables, write_results
from soups.reporting import draw_page
from soups.reporting.page import Page
from soups.stores.files import write_text

HERE = Path(__file__).parent
PAIRS = (
    ("50% seed: ensemble by posterior", "dense"),
    ("50% seed: average by posterior", "50% seed: ensemble by posterior"),
    ("50% seed: uniform average", "dense"),
    ("0% seed: uniform average", "50% seed: uniform average"),
    ("0% seed: ensemble by posterior", "50% seed: ensemble by posterior"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "btm")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    pages = repeat("btm", arguments.seeds, arguments.output, lambda seed: [f"seed={seed}", *arguments.overrides])
    text = f"{tables(pages)}\nDifferences within a seed (mean ± sd over {len(pages)} seeds):\n\n{differences(pages, PAIRS)}"
    print(text)
    write_text(HERE / "table.md", text)
    write_results(pages, arguments.seeds, HERE / "results.csv")
    parts = list(curves(pages))
    draw_page(Page(title="btm", subject="protocol", summary="", parts=parts), HERE)


if __name__ == "__main__":
    main()
