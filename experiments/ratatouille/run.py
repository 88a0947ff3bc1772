"""Model Ratatouille against the uniform soup of as many vanilla fine-tunes, and against fusing, over seeds.

    python -m experiments.ratatouille.run                 three seeds, then the table and the figure
    python -m experiments.ratatouille.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.pages import ROOT, differences, repeat, scatter, tables, write_results
from soups.reporting import draw_page
from soups.reporting.page import Page
from soups.stores.files import write_text

HERE = Path(__file__).parent
PAIRS = (
    ("ratatouille", "uniform soup"),
    ("ratatouille", "recycled members (mean)"),
    ("uniform soup", "vanilla (mean)"),
    ("ratatouille", "fusing"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "recycling")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    pages = repeat(
        "ratatouille", arguments.seeds, arguments.output, lambda seed: [f"seed={seed}", *arguments.overrides]
    )
    text = f"{tables(pages)}\nDifferences within a seed (mean ± sd over {len(pages)} seeds):\n\n{differences(pages, PAIRS)}"
    print(text)
    write_text(HERE / "table.md", text)
    write_results(pages, arguments.seeds, HERE / "results.csv")
    parts = list(scatter(pages))
    draw_page(Page(title="ratatouille", subject="protocol", summary="", parts=parts), HERE)


if __name__ == "__main__":
    main()
