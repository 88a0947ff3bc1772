"""A Hydra and Lightning program as people have it. Nothing in it knows of soups; with soups installed beside it:

python examples/hydra_project/train.py                                  # one run
python examples/hydra_project/train.py +soup=greedy                     # the sweep of conf/config.yaml, then the soup
python examples/hydra_project/train.py +soup=uniform sweep.size=6 model.lr=0.1
"""

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split


class Classifier(pl.LightningModule):
    """A small network on scikit-learn's digits."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the cross-entropy of a batch."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Log the validation accuracy."""
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Log the test accuracy."""
        self.log("test/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Digits(pl.LightningDataModule):
    """Train, validation and test splits of the digits."""

    def setup(self, stage: str) -> None:
        """Split with a fixed seed."""
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(labels))
        self.parts = random_split(data, [1000, 400, 397], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training batches."""
        return DataLoader(self.parts[0], 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation split as one batch."""
        return DataLoader(self.parts[1], 400)

    def test_dataloader(self) -> DataLoader:
        """Return the test split as one batch."""
        return DataLoader(self.parts[2], 397)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(cfg: DictConfig) -> None:
    """Fit the model of the configuration."""
    pl.seed_everything(cfg.seed, verbose=False)
    checkpoint = ModelCheckpoint(monitor="val/acc", mode="max")  # what it watches is what the soup is chosen by
    trainer = pl.Trainer(**cfg.trainer, callbacks=[checkpoint], default_root_dir=cfg.output)
    trainer.fit(Classifier(**cfg.model), datamodule=Digits())


if __name__ == "__main__":
    train()
