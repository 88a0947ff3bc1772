"""Post-hoc EMA: one training run, and the held-out loss as a function of the EMA length chosen after it.

    python -m experiments.posthoc_ema.run        (about 6 minutes on one CPU thread; writes results.csv)
    python -m experiments.posthoc_ema.figures    (writes length.png and prints the table)

The learning rate stays at its peak after the warm-up, so that the end of the run is noisy. Beside the snapshots a power-function
average of σ = 0.15, which is not among the tracked profiles, is kept directly: its synthesis can be compared with it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import torch

from experiments.language_model import LanguageModel, quiet_trainer
from soups.averaging import Exponential, PostHoc, Power, Window, averaged
from soups.averaging.mean import Mean
from soups.averaging.power import PowerEMA
from soups.averaging.profiles import Profile
from soups.averaging.units import RunLength
from soups.callbacks import PostHocEMA
from soups.callbacks.base import Averaging
from soups.callbacks.settings import Common, settings_of

HERE = Path(__file__).parent
STEPS, PEAK = 2000, 4e-3
DIRECT = 0.15
SIGMAS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.15, 0.18, 0.22, 0.25)


class Direct(Averaging):
    """A power-function average that is simply kept, to compare with."""

    def __init__(self, sigma: float, **options: Unpack[Common]) -> None:
        super().__init__(settings_of(options, name="direct"))
        self.sigma = sigma

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the average."""
        return {"direct": PowerEMA(self.sigma, covers=covers)}


def held_out_loss(module: LanguageModel, weights: dict[str, torch.Tensor]) -> float:
    module.eval()
    with averaged(module, weights), torch.no_grad():
        return float(torch.stack([module.loss(batch) for batch in module.val_dataloader()]).mean())


def profiles(steps: int) -> list[tuple[str, float, Profile]]:
    found: list[tuple[str, float, Profile]] = [("power", sigma, Power(sigma, steps)) for sigma in SIGMAS]
    found += [("exponential", h, Exponential.of(steps, half_life=h * steps)) for h in (0.01, 0.02, 0.05, 0.1)]
    found += [("window", w, Window(steps, round(w * steps))) for w in (0.05, 0.1, 0.2, 0.4)]
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--out", type=Path, default=HERE / "results.csv")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "profile", "length", "residual", "amplification", "loss", "distance"])
        for seed in range(options.seeds):
            begin = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                direct, callback = Direct(DIRECT), PostHocEMA(snapshot_every="2%", folder=folder)
                module = LanguageModel(PEAK, options.steps, floor=1.0, seed=seed)
                quiet_trainer(options.steps, options.steps, [callback, direct]).fit(module)
                raw = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
                true = direct.average("direct")
                size = sum(float(true[name].square().sum()) for name in true) ** 0.5
                writer.writerow([seed, "raw", 0, 0, 1, held_out_loss(module, raw), ""])
                writer.writerow([seed, "direct", DIRECT, 0, 1, held_out_loss(module, true), ""])
                posthoc = PostHoc(folder)
                for kind, length, profile in profiles(options.steps):
                    made = posthoc.synthesize(profile)
                    distance = ""
                    if (kind, length) == ("power", DIRECT):
                        distance = sum(float((made.weights[n] - true[n]).square().sum()) for n in true) ** 0.5 / size
                    row = [seed, kind, length, made.fit.residual, made.fit.amplification]
                    writer.writerow([*row, held_out_loss(module, made.weights), distance])
            file.flush()
            print(f"seed {seed}: {time.process_time() - begin:.0f} CPU-s", file=sys.stderr)


if __name__ == "__main__":
    main()
