"""Fits of small modules, as an intercepted `trainer.fit` hands them over."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from soups.launch.own_program.interception import Fit, fits_go_to

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def fit_of(
    package: str = "lightning.pytorch",
    callbacks: Callable[[Any], list[Any]] = lambda pl: [],
    optimizers: Callable[[Any], Any] = lambda module: torch.optim.SGD(module.parameters(), 0.1),
    log: Callable[[Any, float], None] = lambda module, value: module.log("val/acc", value),
    samples: int = 12,
    **options: Any,
) -> Fit:
    """Return the fit of a module whose validation logs its one weight."""
    pl: Any = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.25]))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return (self.weight - 1).square().sum()

        def validation_step(self, batch: Any, index: int) -> None:
            log(self, float(self.weight))

        def configure_optimizers(self) -> Any:
            return optimizers(self)

    data = TensorDataset(torch.arange(float(samples)))
    loader = DataLoader(data, 4)
    seen: list[Fit] = []
    plain = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    with fits_go_to(seen.append):
        trainer = pl.Trainer(
            **{"logger": False, "enable_checkpointing": False, **plain, **options}, callbacks=callbacks(pl)
        )
        trainer.fit(Module(), loader, val_dataloaders=loader)
    return seen[0]


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    return request.param
