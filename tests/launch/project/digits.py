"""The project's own module and data: scikit-learn's digits and a small network."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Digits(pl.LightningDataModule):
    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        rest, test, rest_labels, test_labels = train_test_split(pixels, labels, test_size=300, random_state=0)
        train, val, train_labels, val_labels = train_test_split(rest, rest_labels, test_size=400, random_state=0)

        def dataset(x, y) -> TensorDataset:
            return TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))

        self.train, self.val = dataset(train, train_labels), dataset(val, val_labels)
        self.test = dataset(test, test_labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 400)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 300)


class Classifier(pl.LightningModule):
    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
        self.accuracy = nn.ModuleDict({name: MulticlassAccuracy(10, average="micro") for name in ("_val", "_test")})
        self.best = 0.0

    def training_step(self, batch, index: int):
        return cross_entropy(self.net(batch[0]), batch[1])

    def _evaluate(self, batch, name: str) -> None:
        logits = self.net(batch[0])
        self.accuracy[f"_{name}"](logits, batch[1])
        self.log(f"{name}/acc", self.accuracy[f"_{name}"], on_epoch=True)
        self.log(f"{name}/loss", cross_entropy(logits, batch[1]))

    def validation_step(self, batch, index: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.best = max(self.best, float(self.accuracy["_val"].compute()))
        self.log("val/best", self.best)

    def test_step(self, batch, index: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
