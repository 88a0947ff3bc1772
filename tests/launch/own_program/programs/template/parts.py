"""Module and data in the manner of lightning-hydra-template: partial optimiser, scheduler, a MaxMetric of the best so far."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class DigitsDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 64, fold: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str | None = None) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.hparams["fold"]))
        whole = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
        parts = zip(*(part.split([1097, 400, 300]) for part in whole), strict=True)
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams["batch_size"])

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.hparams["batch_size"])


class DigitsModule(L.LightningModule):
    def __init__(self, net: nn.Module, optimizer, scheduler, compile: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net, self.criterion = net, nn.CrossEntropyLoss()
        self.val_acc, self.test_acc = MulticlassAccuracy(10, average="micro"), MulticlassAccuracy(10, average="micro")
        self.val_loss, self.val_acc_best = MeanMetric(), MaxMetric()

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def training_step(self, batch, index: int):
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, index: int) -> None:
        logits = self.net(batch[0])
        self.val_loss(self.criterion(logits, batch[1]))
        self.val_acc(logits, batch[1])
        self.log("val/loss", self.val_loss, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)
        self.logger.log_metrics({"val/by_hand": 1.0})  # fails without a logger
        assert self.trainer.checkpoint_callback is not None

    def test_step(self, batch, index: int) -> None:
        self.test_acc(self.net(batch[0]), batch[1])
        self.log("test/acc", self.test_acc, on_epoch=True)

    def setup(self, stage: str) -> None:
        if self.hparams["compile"] and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams["optimizer"](params=self.trainer.model.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch"},
        }


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
