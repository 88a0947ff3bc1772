"""A plain Lightning program with one more callback: an exponential moving average of the weights, validated beside them.

python examples/lightning_ema.py
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from soups.callbacks import EMA


class Digits(pl.LightningModule):
    """A small network on scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the cross-entropy of a batch."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD with a large constant learning rate, whose last weights are noisy."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(labels))
    train, held_out = torch.utils.data.random_split(data, [1400, 397], torch.Generator().manual_seed(0))
    ema = EMA(
        half_life="10%", validate="both"
    )  # a tenth of the run; metrics of the average are logged as "accuracy_ema"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=10, callbacks=[ema], enable_checkpointing=False, **quiet)
    module = Digits()
    trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(held_out, 397))
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name}: {float(value):.4f}")
