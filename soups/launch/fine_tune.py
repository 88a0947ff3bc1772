"""One fine-tune: from the shared start to a finished ingredient in the pool."""

from __future__ import annotations

import os
import platform
import time
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.utils.data import DataLoader

from soups.errors import ConfigError, SoupError
from soups.evaluation import predict, score
from soups.launch.progress import ReportProgress
from soups.launch.settings import (
    Settings,
    build_network,
    build_splits,
    check,
    determinants,
    device_count,
    launched_outside,
    name_of,
    open_pool,
    versions,
)
from soups.launch.start import ensure_start, evaluation_batches
from soups.launch.tracking import close_logger, ingredient_logger
from soups.stores.pool import Failure, Ingredient, Pool
from soups.tasks.classification import Classification
from soups.tasks.images import Augmentation, Batches, OrderedBatches, ShuffledBatches, Splits
from soups.tasks.models import Network


class ImageData(lightning.LightningDataModule):
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
        """Return the train split, augmented."""
        loader, seed = self.settings["loader"], int(self.settings["seed"])
        augmentation = Augmentation(**self.settings["augment"])
        dataset = Batches(
            self.splits.train, int(loader["size"]), self.network.mean, self.network.std, augmentation, seed
        )
        sampler = ShuffledBatches(len(dataset), int(loader["batch_size"]), seed, *self._ranks())
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=int(loader["workers"]), pin_memory=_pin()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out split, every sample on exactly one rank."""
        loader = self.settings["loader"]
        dataset = Batches(self.splits.heldout, int(loader["size"]), self.network.mean, self.network.std)
        sampler = OrderedBatches(len(dataset), int(loader["eval_batch_size"]), *self._ranks())
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=int(loader["workers"]), pin_memory=_pin()
        )


def _pin() -> bool:
    return torch.cuda.is_available()


def fine_tune(settings: Settings, show_progress: bool = True) -> Ingredient:
    """Return the ingredient of these settings: from the pool if it is there, else fine-tuned now.

    With several devices the fit runs in processes of its own, started from one small program that knows only this
    ingredient, so that Lightning's child processes repeat the fit and not the sweep around it.

    Args:
        settings: the resolved configuration.
        show_progress: draw a progress bar for this fit; a sweep draws one for all.

    Raises:
        SoupError: a mistake in the settings, unreadable data, a pool that cannot be written, a fit that diverged.
    """
    check(settings)
    pool = open_pool(settings)
    splits = build_splits(settings)
    start, start_weights = ensure_start(settings, splits)
    determined = determinants(settings, start.weights, splits.hash())
    name = name_of(determined)
    if name in pool:
        return pool.ingredient(name)
    pool.check_writable()
    try:
        if device_count(settings) > 1 and not launched_outside():
            from soups.launch.worker import run_in_processes

            run_in_processes("fit", settings, show_progress)
        else:
            fit(settings, splits, start, start_weights, show_progress)
    except SoupError as error:
        pool.fail(Failure(fingerprint=name, error=str(error), determinants=determined))
        raise
    except Exception as error:
        pool.fail(Failure(fingerprint=name, error=f"{type(error).__name__}: {error}", determinants=determined))
        raise
    return pool.ingredient(name)


def fit(
    settings: Settings,
    splits: Splits,
    start: Ingredient,
    start_weights: dict[str, Tensor],
    show_progress: bool = True,
) -> None:
    """Fine-tune in this process (one of the ranks) and let rank 0 add the result to the pool."""
    began = time.perf_counter()
    pool = open_pool(settings)
    determined = determinants(settings, start.weights, splits.hash())
    name = name_of(determined)
    lightning.seed_everything(int(settings["seed"]), workers=True, verbose=False)
    network = build_network({**settings, "model": {**settings["model"], "pretrained": False}}, len(splits.classes))
    network.module.load_state_dict(start_weights)
    module = Classification(network, len(splits.classes), settings["optimizer"], **settings["task"])
    logger = ingredient_logger(settings, name, determined)
    trainer = _trainer(settings, pool, name, logger, show_progress)
    trainer.fit(module, datamodule=ImageData(splits, network, settings))
    if trainer.interrupted:
        raise KeyboardInterrupt
    fitted = time.perf_counter()
    device = trainer.strategy.root_device
    heldout = evaluation_batches(settings, splits.heldout, network)
    logits = predict(module.to(device), heldout, device)
    numbers = score(logits, splits.heldout.labels)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in network.module.state_dict().items()}
    if trainer.is_global_zero:
        record = Ingredient(
            fingerprint=name,
            determinants=determined,
            config=settings,
            start=start.weights,
            split=splits.hash(),
            metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
            durations={"fit": fitted - began, "total": time.perf_counter() - began},
            versions=versions(),
            layout=_layout(trainer),
            notes={"train_loss": float(cast(Any, trainer.callback_metrics.get("train/loss", float("nan"))))},
        )
        try:
            added = pool.add(record, weights)
            pool.add_predictions(added.weights, splits.heldout.digest(), logits)
        finally:
            close_logger(logger, {"heldout/accuracy": numbers.accuracy, "heldout/loss": numbers.loss})
    trainer.strategy.barrier("ingredient")


def _trainer(settings: Settings, pool: Pool, name: str, logger: Any, show_progress: bool) -> lightning.Trainer:
    options = dict(settings["trainer"])
    threads = options.pop("threads", None)
    if threads:
        torch.set_num_threads(int(threads))
    callbacks: list[lightning.Callback] = [ReportProgress(pool, name)]
    if show_progress:
        callbacks.append(RichProgressBar())
    try:
        return lightning.Trainer(
            **options,
            callbacks=callbacks,
            logger=logger or False,
            enable_progress_bar=show_progress,
            enable_checkpointing=False,  # the pool keeps the result; a fit is the unit that is redone
            enable_model_summary=False,
            use_distributed_sampler=False,  # ours give every sample to exactly one rank
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Lightning's Trainer does not take these trainer.* settings: {error}") from error


def _layout(trainer: lightning.Trainer) -> dict[str, Any]:
    return {
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "process": os.getpid(),
    }
