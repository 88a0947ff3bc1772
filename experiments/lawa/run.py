"""LAWA and Early Weight Averaging on a small language model: held-out loss against steps, at two peak learning rates.

    python -m experiments.lawa.run        (about 10 minutes on one CPU thread; writes results.csv)
    python -m experiments.lawa.figures    (writes loss.png and prints the table)

One run a seed and peak; all averages are kept in the same run and validated beside the raw weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from experiments.language_model import LanguageModel, quiet_trainer
from soups.callbacks import EMA, LAWA

HERE = Path(__file__).parent
STEPS, EVERY = 2000, 100
PEAKS = (1e-3, 8e-3)


class Record(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("loss"):
                self.rows.append((trainer.global_step, name.removeprefix("loss").lstrip("_") or "raw", float(value)))


def averages(steps: int) -> list[pl.Callback]:
    return [
        LAWA(k=10, every=f"{max(1, steps // 100)}st", name="lawa", validate="both"),  # one tenth of the run
        LAWA(
            k=5, every=f"{max(1, steps // 25)}st", name="early", validate="both"
        ),  # k and spacing of 2306.03241, scaled
        EMA(half_life=f"{max(1, steps // 50)}st", name="ema", validate="both"),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--out", type=Path, default=HERE / "results.csv")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    every = max(1, options.steps * EVERY // STEPS)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["peak", "seed", "step", "weights", "loss"])
        for seed in range(options.seeds):
            for peak in PEAKS:
                begin, record = time.process_time(), Record()
                module = LanguageModel(peak, options.steps, seed=seed)
                quiet_trainer(options.steps, every, [record, *averages(options.steps)]).fit(module)
                writer.writerows((peak, seed, *row) for row in record.rows)
                file.flush()
                print(f"peak {peak:g} seed {seed}: {time.process_time() - begin:.0f} CPU-s", file=sys.stderr)


if __name__ == "__main__":
    main()
