"""Draw loss.png and print the table from results.csv: `python -m experiments.lawa.figures`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
LABELS = {
    "raw": "raw weights",
    "ema": "EMA, half-life 2 % of the run",
    "lawa": "LAWA, k = 10 over the last 10 %",
    "early": "LAWA, k = 5 over the last 20 %",
}
COLOURS = {"raw": "0.55", "ema": "tab:green", "lawa": "tab:blue", "early": "tab:orange"}


def read() -> dict[tuple[float, str], dict[int, list[float]]]:
    """Return the losses of all seeds by (peak, weights) and step."""
    found: dict[tuple[float, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (HERE / "results.csv").open() as file:
        for row in csv.DictReader(file):
            found[float(row["peak"]), row["weights"]][int(row["step"])].append(float(row["loss"]))
    return found


def main() -> None:
    found = read()
    peaks = sorted({peak for peak, _ in found})
    figure, axes = plt.subplots(1, len(peaks), figsize=(9.5, 3.8), sharey=True, constrained_layout=True)
    for axis, peak in zip(axes, peaks, strict=True):
        for weights, label in LABELS.items():
            series = found[peak, weights]
            steps = sorted(series)
            mean = np.array([np.mean(series[step]) for step in steps])
            spread = np.array([np.std(series[step], ddof=1) for step in steps])
            axis.plot(steps, mean, label=label, color=COLOURS[weights], lw=1.6)
            axis.fill_between(steps, mean - spread, mean + spread, color=COLOURS[weights], alpha=0.2, lw=0)
        axis.set(title=f"peak learning rate {peak:g}", xlabel="optimizer steps")
        axis.grid(alpha=0.3)
        axis.set_ylim(min(np.mean(v) for s in found.values() for v in s.values()) - 0.05, 2.75)
    axes[0].set_ylabel("held-out loss (nats a character)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "loss.png", dpi=150)
    last = max(next(iter(found.values())))
    for step in (last // 4, last // 2, 3 * last // 4, last):
        print(f"step {step}")
        for peak in peaks:
            raw = np.array(found[peak, "raw"][step])
            for weights in LABELS:
                losses = np.array(found[peak, weights][step])
                gain = losses - raw
                print(
                    f"  peak {peak:<6g} {weights:6} {losses.mean():.3f} ± {losses.std(ddof=1):.3f}"
                    + ("" if weights == "raw" else f"   minus raw {gain.mean():+.3f} ± {gain.std(ddof=1):.3f}")
                )
    # Steps that an average saves: where it first reaches the raw weights' final loss.
    for peak in peaks:
        target = np.mean(found[peak, "raw"][last])
        for weights in LABELS:
            series = found[peak, weights]
            reached = [step for step in sorted(series) if np.mean(series[step]) <= target]
            print(
                f"peak {peak:<6g} {weights:6} reaches the raw final loss {target:.3f} at step {reached[0] if reached else '-'}"
            )


if __name__ == "__main__":
    main()
