"""A program in the manner of potentials and forecasts: `pytorch_lightning`, gradients in validation, an error as metric.

It runs in Hydra's folder of the job (version_base 1.1), keeps state that is no tensor, and fits once or twice.
"""

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Energy(pl.LightningModule):
    """A polynomial's energy; forces are its gradients, in validation too."""

    def __init__(self, lr: float, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
        self.scales = {"energy": 2.0}

    def get_extra_state(self) -> dict:
        return {"scales": self.scales}

    def set_extra_state(self, state: dict) -> None:
        self.scales = state["scales"]

    def loss(self, batch) -> torch.Tensor:
        x, energy, forces = batch
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            found = self.net(x).squeeze(1)
            (slope,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return (found - energy).square().mean() + (slope + forces).square().mean()

    def training_step(self, batch, index: int):
        return self.loss(batch)

    def validation_step(self, batch, index: int) -> None:
        self.log("val/rmse", self.loss(batch).detach().sqrt())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


class Points(pl.LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def setup(self, stage: str) -> None:
        x = 2 * torch.rand(300, 2, generator=torch.Generator().manual_seed(self.seed)) - 1
        whole = TensorDataset(x, x.square().sum(1), -2 * x)
        self.parts = [torch.utils.data.Subset(whole, range(*bounds)) for bounds in ((0, 200), (200, 300))]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], 20, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], 50)


@hydra.main(version_base="1.1", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    pl.seed_everything(cfg.seed)
    data = Points(cfg.data.seed)
    module = Energy(cfg.lr)
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if cfg.warm_up == "loop":
        optimizer = torch.optim.Adam(module.parameters())
        module.net(torch.zeros(1, 2)).sum().backward()
        optimizer.step()
    elif cfg.warm_up:
        pl.Trainer(max_epochs=1, inference_mode=False, enable_checkpointing=False, **plain).fit(module, data)
        if cfg.warm_up == "another":
            module = Energy(cfg.lr)
    checkpoint = pl.callbacks.ModelCheckpoint(monitor="val/rmse", mode="min", dirpath="checkpoints")
    trainer = pl.Trainer(max_epochs=3, inference_mode=False, callbacks=[checkpoint], **plain)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["val/rmse"])


if __name__ == "__main__":
    main()
