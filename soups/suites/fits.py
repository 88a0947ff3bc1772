"""Fits of a suite: its experts, and a base model where one is trained here. One module under Lightning, no Hydra."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader

from soups.errors import ConfigError
from soups.fitting.spec import FitSpec
from soups.tasks.classification import Classification
from soups.tasks.data import Batch, Samples, ShuffledBatches
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


def fit(
    network: Network,
    samples: Samples,
    classes: int,
    spec: FitSpec,
    device: torch.device,
    on_step: OnStep = lambda: None,
) -> None:
    """Train what is trainable of a network, in place.

    Args:
        network: to train; its parameters that need no gradient stay as they are.
        samples: of the train split.
        classes: of the task.
        spec: the fit.
        device: where to train.
        on_step: called after each batch.

    Raises:
        ConfigError: Lightning's Trainer does not take the settings.
        KeyboardInterrupt: the user stopped the fit.
    """
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hardware and tips
    lightning.seed_everything(spec.seed, workers=True, verbose=False)
    augment = None if spec.augment is None else spec.augment.model_dump()
    dataset = network.input.dataset(samples, spec.loader.size, augment, spec.seed)
    order = ShuffledBatches(len(samples), spec.loader.batch_size, spec.seed)
    loader: DataLoader[Batch] = DataLoader(dataset, sampler=order, batch_size=None)
    module = Classification(network, classes, spec.optimizer.model_dump(), **spec.task.model_dump())
    try:
        trainer = lightning.Trainer(
            **spec.trainer.plain(),
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            callbacks=[_Steps(on_step)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Lightning's Trainer does not take the suite's trainer settings: {error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*module.s. in eval mode at the start of training.*")  # frozen layers
        trainer.fit(module, loader)
    if trainer.interrupted:
        raise KeyboardInterrupt
    network.module.to(device).eval()
