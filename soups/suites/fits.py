"""Fits of a suite: its experts, and a base model where one is trained here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import torch

from soups.fitting.configuration import Devices, Layout, LoaderLayout, Paths, PoolSection, Tracking
from soups.fitting.quiet import quiet
from soups.fitting.spec import FitSpec, Validation
from soups.fitting.training import TaskData, train_module
from soups.tasks.classification import Classification
from soups.tasks.data import Splits
from soups.tasks.network import Network

OnStep = Callable[[], None]


class _Steps(lightning.Callback):
    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._on_step()


def steps_of(spec: FitSpec, samples: int) -> int:
    """Return how many batches a fit takes."""
    return max(1, spec.trainer.max_epochs or 1) * (samples // min(spec.loader.batch_size, samples))


def fit(network: Network, splits: Splits, spec: FitSpec, device: torch.device, on_step: OnStep = lambda: None) -> None:
    """Train what is trainable of a network on a task's train split, in place.

    Args:
        network: to train; its parameters that need no gradient stay as they are.
        splits: of the task.
        spec: the fit.
        device: where to train.
        on_step: called after each batch.

    Raises:
        soups.errors.ConfigError: Lightning's Trainer does not take the settings.
        KeyboardInterrupt: the user stopped the fit.
    """
    quiet()
    layout = Layout(
        devices=Devices(accelerator="gpu" if device.type == "cuda" else device.type),
        validation=Validation(limit_val_batches=0),
        loader=LoaderLayout(),
        tracking=Tracking(),
        pool=PoolSection(path=""),
        paths=Paths(),
    )
    module = Classification(network, len(splits.classes), spec.optimizer.plain(), **spec.task.shallow())
    train_module(spec, layout, module, TaskData(splits, network, spec, layout), [_Steps(on_step)])
    network.module.to(device).eval()
