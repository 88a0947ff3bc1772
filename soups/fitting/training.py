"""Training under Lightning, as a `FitSpec` and a `Layout` say."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from soups.callbacks import Averaging
from soups.errors import ConfigError, did_you_mean
from soups.fitting.configuration import Layout
from soups.fitting.schema import build
from soups.fitting.spec import RAW, FitSpec
from soups.fitting.task import build_network, build_splits
from soups.tasks.classification import Classification
from soups.tasks.data import OrderedBatches, ShuffledBatches, Splits
from soups.tasks.network import Network
from soups.weights import Weights


class TaskData(lightning.LightningDataModule):
    """Loaders of a task for one rank: shuffled global batches for training, the held-out split for validation.

    The test and out-of-distribution splits are not here: fine-tuning never sees them.
    """

    def __init__(self, splits: Splits, network: Network, spec: FitSpec, layout: Layout) -> None:
        super().__init__()
        self.splits, self.network, self.spec, self.layout = splits, network, spec, layout

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the train split, augmented where the data can be."""
        spec, samples = self.spec, self.splits.train
        augment = None if spec.augment is None else spec.augment.shallow()
        dataset = self.network.input.dataset(samples, spec.loader.size, augment, spec.seed)
        return self._loader(dataset, ShuffledBatches(len(samples), spec.loader.batch_size, spec.seed, *self._ranks()))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out split, every sample on exactly one rank."""
        samples = self.splits.heldout
        dataset = self.network.input.dataset(samples, self.spec.loader.size)
        return self._loader(dataset, OrderedBatches(len(samples), self.layout.loader.eval_batch_size, *self._ranks()))

    def _loader(self, dataset: Any, sampler: Any) -> DataLoader[Any]:
        pin = torch.cuda.is_available()
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=self.layout.loader.workers, pin_memory=pin
        )


def train(
    spec: FitSpec,
    layout: Layout,
    base_model: Weights,
    splits: Splits | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    logger: Any | None = None,
    show_progress: bool = False,
    class_groups: Sequence[int] = (),
) -> tuple[Network, lightning.Trainer]:
    """Fine-tune a network from `base_model` and return it with the trainer that did it.

    The network comes back with its last weights, or with the average that `spec.keep` names.

    Args:
        spec: everything that decides the weights.
        layout: where the fit runs.
        base_model: the weights it starts from.
        splits: of `spec.data`, where they are built already.
        callbacks: that watch, besides those of `spec`.
        logger: Lightning's.
        show_progress: draw a progress bar.
        class_groups: for tasks pooled under one head, how many classes each has; see `Classification`.

    Raises:
        ConfigError: the Trainer does not take these settings.
        KeyboardInterrupt: the user stopped the fit; Lightning ended it in good order.
    """
    splits = splits or build_splits(spec.data)
    classes = len(splits.classes)
    seed = spec.start.seed if spec.start else 0  # of a network whose every weight is replaced
    network = build_network(spec.model, classes, seed, spec.task.channels_last, pretrained=False)
    network.module.load_state_dict(dict(base_model))
    task = spec.task.shallow()
    module = Classification(network, classes, spec.optimizer.plain(), class_groups=class_groups, **task)
    data = TaskData(splits, network, spec, layout)
    return network, train_module(spec, layout, module, data, callbacks, logger, show_progress)


def train_module(
    spec: FitSpec,
    layout: Layout,
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
    lightning.seed_everything(spec.seed, workers=True, verbose=False)
    chosen = [build(section, f"callbacks.{name}") for name, section in spec.callbacks.items()]
    average = _averaging(spec.keep, chosen)
    trainer = _trainer(spec, layout, [*callbacks, *chosen], logger, show_progress)
    # Deterministic mode also fills fresh memory, to expose reads of it; that changes no result and costs a tenth of a fit.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (unknown to torch's stubs)
    trainer.fit(module, datamodule=data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if average is not None:
        average.apply(spec.keep)
    return trainer


def _averaging(name: str, callbacks: Sequence[Any]) -> Averaging | None:
    """Return the callback that keeps the average called `name`, or None for the last weights.

    Raises:
        ConfigError: no callback keeps such an average.
    """
    if name == RAW:
        return None
    kept = {
        member.settings.name: callback
        for callback in callbacks
        if isinstance(callback, Averaging)
        for member in callback.callbacks()
    }
    if name not in kept:
        raise ConfigError(
            f"ingredient.weights={name}, but no callback keeps an average of that name. "
            f"{did_you_mean(name, [RAW, *kept])} Add one: callbacks=[{name}]."
        )
    return kept[name]


def _trainer(
    spec: FitSpec, layout: Layout, callbacks: Sequence[lightning.Callback], logger: Any | None, show_progress: bool
) -> lightning.Trainer:
    options = {**layout.devices.plain(), **layout.validation.plain(), **spec.trainer.plain()}
    if threads := options.pop("threads", None):
        torch.set_num_threads(threads)
    try:
        return lightning.Trainer(
            **options,
            callbacks=[*callbacks, *([RichProgressBar()] if show_progress else [])],
            logger=logger or False,
            default_root_dir=layout.paths.output,
            enable_progress_bar=show_progress,
            enable_checkpointing=False,  # the pool keeps the result; a fit is the unit that is redone
            enable_model_summary=False,
            use_distributed_sampler=False,  # ours give every sample to exactly one rank
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Lightning's Trainer does not take these trainer.* settings: {error}") from error


def ran_on(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return what a fit ran on, for the record."""
    return {
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "process": os.getpid(),
    }
