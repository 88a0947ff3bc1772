"""Draw length.png and print the table from results.csv: `python -m experiments.posthoc_ema.figures`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    losses: dict[tuple[str, float], list[float]] = defaultdict(list)
    facts: dict[tuple[str, float], tuple[float, float]] = {}
    distances: list[float] = []
    with (HERE / "results.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["profile"], float(row["length"])
            losses[key].append(float(row["loss"]))
            facts[key] = float(row["residual"]), float(row["amplification"])
            if row["distance"]:
                distances.append(float(row["distance"]))
    print(f"{'profile':12}{'length':>8}{'held-out loss':>18}{'residual':>10}{'sum |x|':>9}")
    for key, values in losses.items():
        residual, amplification = facts[key]
        print(
            f"{key[0]:12}{key[1]:8g}{np.mean(values):10.4f} ± {np.std(values, ddof=1):.4f}{residual:10.4f}{amplification:9.2f}"
        )
    raw = np.array(losses["raw", 0.0])
    best = min((key for key in losses if key[0] == "power"), key=lambda key: float(np.mean(losses[key])))
    gain = np.array(losses[best]) - raw
    print(f"best sigma {best[1]:g}: {gain.mean():+.4f} ± {gain.std(ddof=1):.4f} against the raw weights (paired)")
    print(
        f"sigma 0.15 synthesised against kept: ‖difference‖/‖kept‖ {np.mean(distances):.2e} (max {max(distances):.2e})"
    )

    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    keys = sorted(key for key in losses if key[0] == "power")
    mean = np.array([np.mean(losses[key]) for key in keys])
    spread = np.array([np.std(losses[key], ddof=1) for key in keys])
    lengths = [100 * key[1] for key in keys]
    axis.plot(lengths, mean, "o-", color="tab:blue", label="power-function EMA, synthesised after training")
    axis.fill_between(lengths, mean - spread, mean + spread, color="tab:blue", alpha=0.2, lw=0)
    axis.errorbar([15], [np.mean(losses["direct", 0.15])], [np.std(losses["direct", 0.15], ddof=1)], fmt="s", color="tab:orange",
                  capsize=3, label="the same, kept while training")  # fmt: skip
    axis.axhline(raw.mean(), color="0.5", ls="--", label="raw weights")
    axis.axhspan(raw.mean() - raw.std(ddof=1), raw.mean() + raw.std(ddof=1), color="0.5", alpha=0.15, lw=0)
    axis.axvline(5, color="0.8", lw=0.8, zorder=0)
    axis.axvline(10, color="0.8", lw=0.8, zorder=0)
    axis.set(xlabel="EMA length σ (% of training; tracked: 5 and 10)", ylabel="held-out loss (nats a character)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "length.png", dpi=150)


if __name__ == "__main__":
    main()
