"""Draw accuracy.png and print the table from results.csv: `python -m experiments.swa.figures`."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ORDER = ("sgd", "raw under swa_lr", "swa, old BatchNorm", "swa")


def main() -> None:
    accuracy: dict[str, list[float]] = defaultdict(list)
    loss: dict[str, list[float]] = defaultdict(list)
    with (HERE / "results.csv").open() as file:
        for row in csv.DictReader(file):
            accuracy[row["arm"]].append(100 * float(row["test"]))
            loss[row["arm"]].append(float(row["test_loss"]))
            rates = row["lr"], row["swa_lr"] or "-"
    print(f"learning rate {rates[0]}, swa_lr {rates[1]}, {len(accuracy['sgd'])} seeds")
    for arm in ORDER:
        a, b = np.array(accuracy[arm]), np.array(loss[arm])
        paired = a - np.array(accuracy["sgd"])
        print(
            f"{arm:20} test accuracy {a.mean():.2f} ± {a.std(ddof=1):.2f} %  loss {b.mean():.4f} ± {b.std(ddof=1):.4f}"
            f"  minus sgd {paired.mean():+.2f} ± {paired.std(ddof=1):.2f} points"
        )
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), constrained_layout=True)
    for axis, values, label in ((axes[0], accuracy, "test accuracy (%)"), (axes[1], loss, "test loss (nats)")):
        for place, arm in enumerate(ORDER):
            axis.plot([place] * len(values[arm]), values[arm], "o", color="0.6", ms=4)
            axis.errorbar(
                [place], [np.mean(values[arm])], [np.std(values[arm], ddof=1)], fmt="D", color="tab:blue", capsize=4
            )
        axis.set_xticks(range(len(ORDER)), [arm.replace(" under", "\nunder").replace(", ", ",\n") for arm in ORDER])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(HERE / "accuracy.png", dpi=150)


if __name__ == "__main__":
    main()
