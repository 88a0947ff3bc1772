"""Branch-Train-Merge: does it need the seed phase, and what do its averages cost against its ensemble, over seeds.

    python -m experiments.btm.run                 three seeds, then the table and the figure
    python -m experiments.btm.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

from pathlib import Path

from experiments.pages import curves, study

PAIRS = (
    ("50% seed: ensemble by posterior", "dense"),
    ("50% seed: average by posterior", "50% seed: ensemble by posterior"),
    ("50% seed: uniform average", "dense"),
    ("0% seed: uniform average", "50% seed: uniform average"),
    ("0% seed: ensemble by posterior", "50% seed: ensemble by posterior"),
)

if __name__ == "__main__":
    study("btm", Path(__file__).parent, PAIRS, curves, output="btm", description=__doc__)
