"""Small modules and a quiet Trainer for the callbacks' tests."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from tests.devices import ACCELERATOR

BATCHES, SIZE = 6, 4


def data(seed: int = 0, batches: int = BATCHES) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * SIZE, 3, generator=draw)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(len(x), 1, generator=draw))


class Toy(pl.LightningModule):
    """Linear, BatchNorm, linear; records the raw weights after each step."""

    def __init__(self, *, norm: bool = True, lr: float = 0.05, metric: bool = False, dtype: Any = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        layers = [nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.Linear(5, 1)]
        self.net = nn.Sequential(*layers)
        if dtype is not None:
            self.net = self.net.to(dtype)
        self.lr = lr
        self.metric = MeanMetric() if metric else None
        self.points: list[dict[str, Tensor]] = []
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x.to(self.net[0].weight.dtype)) - y).float().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val/loss", loss)
        if self.metric is not None:
            self.metric(loss)
            self.log("val/metric", self.metric)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def on_train_batch_end(self, *_: Any) -> None:
        self.points.append(snapshot(self))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), batch_size=SIZE)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(1, 2), batch_size=SIZE)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all tensors, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


def snapshot_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all tensors by the names that torch gives them, whatever the module's own `state_dict` does."""
    named = nn.Module.state_dict(module)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "max_epochs": 3,
        "accelerator": ACCELERATOR,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def evaluate(module: Toy, weights: dict[str, Tensor]) -> float:
    """Return the validation loss of a module of the same class with these weights, computed by hand."""
    copy = Toy(norm=any(isinstance(layer, nn.BatchNorm1d) for layer in module.modules()))
    copy.load_state_dict(weights)
    copy.eval()
    with torch.no_grad():
        return float(torch.stack([copy.loss(batch) for batch in copy.val_dataloader()]).mean())


def ema_of(points: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Return the debiased EMA in float64: weights proportional to decay^age."""
    shares = torch.tensor([decay ** (len(points) - 1 - i) for i in range(len(points))], dtype=torch.float64)
    shares /= shares.sum()
    return {
        name: sum(float(s) * p[name].double() for s, p in zip(shares, points, strict=True))  # type: ignore[misc]
        for name, tensor in points[0].items()
        if tensor.is_floating_point()
    }


def mean_of(points: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the equal mean in float64."""
    return {
        name: torch.stack([point[name].double() for point in points]).mean(0)
        for name, tensor in points[0].items()
        if tensor.is_floating_point()
    }


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        pair = found[name].cpu().double(), tensor.cpu().double()
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance, msg=name)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name].cpu(), wanted[name].cpu()) for name in wanted)


@pytest.fixture
def toy() -> SimpleNamespace:
    """Everything above, since tests are no package."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})


@pytest.fixture(autouse=True)
def _quiet(recwarn: Any) -> Any:
    # Lightning warns about workers, loggers and short epochs, none of which matters here.
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # values are compared with the CPU's
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|log_every_n_steps|`logger=True`).*")
        yield
