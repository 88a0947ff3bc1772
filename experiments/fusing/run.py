"""Fusing: a start averaged from auxiliary fine-tunes, against the pretrained one and against each of them, over seeds.

    python -m experiments.fusing.run                 three seeds, then the table and the figure
    python -m experiments.fusing.run --seeds 0 1 2 3 4

A seed is another split of the texts and other fits. Writes results.csv, table.md and figures beside this file.
"""

from __future__ import annotations

from pathlib import Path

from experiments.pages import scatter, study

PAIRS = (("from the fused backbone", "from pretrained"), ("from the fused backbone", "from one auxiliary task (mean)"))

if __name__ == "__main__":
    study("fusing", Path(__file__).parent, PAIRS, scatter, output="recycling", description=__doc__)
