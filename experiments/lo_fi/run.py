"""lo-fi against one synchronous run of the same budget, over seeds.

    python -m experiments.lo_fi.run                 three seeds, then the table and the figure
    python -m experiments.lo_fi.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

from pathlib import Path

from experiments.pages import scatter, study

PAIRS = (("lo-fi", "synchronous (DDP)"), ("lo-fi", "one node (mean)"), ("synchronous (DDP)", "linear probe"))

if __name__ == "__main__":
    study("lo_fi", Path(__file__).parent, PAIRS, scatter, output="recycling", description=__doc__)
