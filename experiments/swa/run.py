"""SWA against its SGD baseline at the same budget: a small convolutional network with BatchNorm on handwritten digits.

    python -m experiments.swa.run        (about 5 minutes on one CPU thread; writes results.csv)
    python -m experiments.swa.figures    (writes accuracy.png and prints the table)

Data: scikit-learn's optical digits (1,797 images of 8 x 8). 400 are trained on (shifted at
random by up to a pixel), 397 held out to choose each arm's learning rate,
1,000 tested once. The baseline is SGD with momentum on the schedule of the SWA paper's code (constant, linear decay, one
hundredth); SWA follows the same schedule down to `swa_lr` only and averages the epochs of the last quarter, with BatchNorm
statistics measured anew. Both learning rates of an arm are chosen on the held-out images, on seeds that are not reported.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from soups.averaging import constant_swa
from soups.callbacks import SWA

HERE = Path(__file__).parent
EPOCHS = 40
SGD_RATES = (0.02, 0.05, 0.1, 0.2)
SWA_RATES = (0.01, 0.02, 0.05, 0.1)


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return training, held-out and test digits, split once by a fixed seed."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16 - 0.5
    y = torch.tensor(labels)[order]
    return tuple(TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 400), (400, 797), (797, 1797)))  # type: ignore[return-value]


class Network(pl.LightningModule):
    def __init__(self, rate: float, swa_rate: float | None, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rate, self.swa_rate, self.seed = rate, swa_rate, seed
        self.train_set, self.held_out, self.test_set = digits()
        layers: list[nn.Module] = []
        for inner, outer in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # every image is shifted by up to one pixel either way, so that the training loss keeps its noise
        padded = nn.functional.pad(batch[0], (1, 1, 1, 1), value=-0.5)
        shifts = torch.stack([padded[:, :, a : a + 8, b : b + 8] for a in range(3) for b in range(3)])
        chosen = torch.randint(9, (len(padded),))
        return nn.functional.cross_entropy(self.net(shifts[chosen, torch.arange(len(padded))]), batch[1])

    def accuracy(self, batch: list[Tensor], name: str) -> None:
        logits = self.net(batch[0])
        self.log(name, (logits.argmax(1) == batch[1]).float().mean())
        self.log(f"{name}_loss", nn.functional.cross_entropy(logits, batch[1]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(batch, "held_out")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        if self.swa_rate is None:
            return [optimizer], [constant_swa(optimizer, start=EPOCHS, swa_lr=self.rate / 100)]
        return [optimizer], [constant_swa(optimizer, start=EPOCHS * 3 // 4, swa_lr=self.swa_rate)]

    def loader(self, data: TensorDataset) -> DataLoader[Any]:
        return DataLoader(data, batch_size=len(data))

    def train_dataloader(self) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, batch_size=50, shuffle=True, generator=draw)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.held_out)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.test_set)


def train(rate: float, swa_rate: float | None, seed: int) -> dict[str, float]:
    """Train once; return held-out and test accuracies in percent and losses, of the raw weights and of the averages."""
    module = Network(rate, swa_rate, seed)
    callbacks = [
        SWA(start="75%", buffers=buffers, batches=8, name=name, validate="both", test="both")
        for name, buffers in (("swa", "reestimate"), ("swa_live", "live"))
    ]
    trainer = pl.Trainer(
        max_epochs=EPOCHS, check_val_every_n_epoch=EPOCHS, callbacks=list(callbacks) if swa_rate else [], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, verbose=False)
    return found | {name: float(value) for name, value in trainer.callback_metrics.items()}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--tuning-seeds", type=int, default=2)
    arguments.add_argument("--out", type=Path, default=HERE / "results.csv")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    tuning = range(100, 100 + options.tuning_seeds)

    def held_out(rate: float, swa_rate: float | None, name: str) -> float:
        return sum(train(rate, swa_rate, seed)[name] for seed in tuning) / len(tuning)

    rate = min(SGD_RATES, key=lambda r: held_out(r, None, "held_out_loss"))
    swa_rate = min(SWA_RATES, key=lambda r: held_out(rate, r, "held_out_loss_swa"))
    print(f"chosen: lr {rate}, swa_lr {swa_rate}; {time.process_time() - begin:.0f} CPU-s", file=sys.stderr)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "lr", "swa_lr", "held_out", "test", "test_loss"])
        for seed in range(options.seeds):
            sgd, swa = train(rate, None, seed), train(rate, swa_rate, seed)
            writer.writerow(["sgd", seed, rate, "", sgd["held_out"], sgd["test"], sgd["test_loss"]])
            for arm, suffix in (("swa", "_swa"), ("swa, old BatchNorm", "_swa_live"), ("raw under swa_lr", "")):
                row = [swa[f"held_out{suffix}"], swa[f"test{suffix}"], swa[f"test_loss{suffix}"]]
                writer.writerow([arm, seed, rate, swa_rate, *row])
            file.flush()
            print(f"seed {seed}: {time.process_time() - begin:.0f} CPU-s", file=sys.stderr)


if __name__ == "__main__":
    main()
