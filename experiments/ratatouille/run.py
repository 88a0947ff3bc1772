"""Model Ratatouille against the uniform soup of as many vanilla fine-tunes, and against fusing, over seeds.

    python -m experiments.ratatouille.run                 three seeds, then the table and the figure
    python -m experiments.ratatouille.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

from pathlib import Path

from experiments.pages import scatter, study

PAIRS = (
    ("ratatouille", "uniform soup"),
    ("ratatouille", "recycled fits (mean)"),
    ("uniform soup", "vanilla (mean)"),
    ("ratatouille", "fusing"),
)

if __name__ == "__main__":
    study("ratatouille", Path(__file__).parent, PAIRS, scatter, output="recycling", description=__doc__)
