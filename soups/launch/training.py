"""Training a network on a task under Lightning, as the settings say; shared by the start and by every ingredient."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader

from soups.callbacks import Averaging
from soups.errors import ConfigError, did_you_mean
from soups.fitting.schema import build
from soups.launch.settings import Settings, build_network
from soups.tasks.classification import Classification
from soups.tasks.data import OrderedBatches, ShuffledBatches, Splits
from soups.tasks.network import Network


class TaskData(lightning.LightningDataModule):
    """Loaders of a task for one rank: shuffled global batches for training, the held-out split for validation.

    The test and out-of-distribution splits are not here: fine-tuning never sees them.
    """

    def __init__(self, splits: Splits, network: Network, settings: Settings) -> None:
        super().__init__()
        self.splits, self.network, self.settings = splits, network, settings

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the train split, augmented where the data can be."""
        loader, seed = self.settings["loader"], int(self.settings["seed"])
        samples = self.splits.train
        dataset = self.network.input.dataset(samples, int(loader["size"]), self.settings["augment"], seed)
        sampler = ShuffledBatches(len(samples), int(loader["batch_size"]), seed, *self._ranks())
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=int(loader["workers"]), pin_memory=_pin()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out split, every sample on exactly one rank."""
        loader = self.settings["loader"]
        samples = self.splits.heldout
        dataset = self.network.input.dataset(samples, int(loader["size"]))
        sampler = OrderedBatches(len(samples), int(loader["eval_batch_size"]), *self._ranks())
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=int(loader["workers"]), pin_memory=_pin()
        )


def _pin() -> bool:
    return torch.cuda.is_available()


def train(
    settings: Settings,
    splits: Splits,
    start: dict[str, Tensor],
    callbacks: Sequence[lightning.Callback] = (),
    logger: Any | None = None,
    show_progress: bool = False,
) -> tuple[Network, lightning.Trainer]:
    """Train a network from `start` and return it with the trainer that did it.

    Besides `callbacks`, the trainer gets those of the settings. The network comes back with its own weights, or with the
    average that `ingredient.weights` names.

    Raises:
        ConfigError: the Trainer does not take these settings.
        KeyboardInterrupt: the user stopped the fit; Lightning ended it in good order.
    """
    network = build_network({**settings, "model": {**settings["model"], "pretrained": False}}, len(splits.classes))
    network.module.load_state_dict(start)
    module = Classification(network, len(splits.classes), settings["optimizer"], **settings["task"])
    trainer = train_module(settings, module, TaskData(splits, network, settings), callbacks, logger, show_progress)
    return network, trainer


def train_module(
    settings: Settings,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    callbacks: Sequence[lightning.Callback] = (),
    logger: Any | None = None,
    show_progress: bool = False,
) -> lightning.Trainer:
    """Train any module on any data as the settings say, and return the trainer that did it.

    Raises:
        ConfigError: the Trainer does not take these settings.
        KeyboardInterrupt: the user stopped the fit; Lightning ended it in good order.
    """
    lightning.seed_everything(int(settings["seed"]), workers=True, verbose=False)
    chosen = [build(section, f"callbacks.{name}") for name, section in (settings.get("callbacks") or {}).items()]
    average = _averaging(settings["ingredient"]["weights"], chosen)
    trainer = _trainer(settings, [*callbacks, *chosen], logger, show_progress)
    # Deterministic mode also fills fresh memory, to expose reads of it; that changes no result and costs a tenth of a fit.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (unknown to torch's stubs)
    trainer.fit(module, datamodule=data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if average is not None:
        average.apply(settings["ingredient"]["weights"])
    return trainer


def _averaging(name: str, callbacks: Sequence[Any]) -> Averaging | None:
    """Return the callback that keeps the average called `name`, or None for the raw weights.

    Raises:
        ConfigError: no callback keeps such an average.
    """
    if name == "raw":
        return None
    kept = {
        member.settings.name: callback
        for callback in callbacks
        if isinstance(callback, Averaging)
        for member in callback.members()
    }
    if name not in kept:
        raise ConfigError(
            f"ingredient.weights={name}, but no callback keeps an average of that name. "
            f"{did_you_mean(name, ['raw', *kept])} Add one: callbacks=[{name}]."
        )
    return kept[name]


def _trainer(
    settings: Settings, callbacks: Sequence[lightning.Callback], logger: Any | None, show_progress: bool
) -> lightning.Trainer:
    options = dict(settings["trainer"])
    threads = options.pop("threads", None)
    if threads:
        torch.set_num_threads(int(threads))
    try:
        return lightning.Trainer(
            **options,
            callbacks=[*callbacks, *([RichProgressBar()] if show_progress else [])],
            logger=logger or False,
            default_root_dir=settings["paths"]["output"],
            enable_progress_bar=show_progress,
            enable_checkpointing=False,  # the pool keeps the result; a fit is the unit that is redone
            enable_model_summary=False,
            use_distributed_sampler=False,  # ours give every sample to exactly one rank
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Lightning's Trainer does not take these trainer.* settings: {error}") from error


def layout(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return what a fit ran on, for the record."""
    return {
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "process": os.getpid(),
    }
