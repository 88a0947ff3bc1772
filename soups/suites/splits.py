"""The data of a suite's task: train, adaptation, held-out and test splits that share no sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from soups.errors import ConfigError, DataError, did_you_mean
from soups.fitting.schema import Target, build
from soups.seeding import generator
from soups.stores.files import fingerprint
from soups.tasks.data import Samples, Splits, check_disjoint

SPLITS = ("train", "adaptation", "heldout", "test")


@dataclass(frozen=True)
class SuiteSplits:
    """The data of one task of a suite.

    Attributes:
        train: what experts are trained on.
        adaptation: what coefficients, routers and statistics are fitted on; no expert was trained on it.
        heldout: what chooses.
        test: what is reported.
        classes: class names in the order of the logits.
    """

    train: Samples
    adaptation: Samples
    heldout: Samples
    test: Samples
    classes: tuple[str, ...]

    def samples(self, split: str) -> Samples:
        """Return a split by its name.

        Raises:
            ConfigError: there is no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"A suite has no split {split!r}: {did_you_mean(split, SPLITS)}")
        return getattr(self, split)

    def hash(self) -> str:
        """Return a hash of all splits and classes."""
        return fingerprint([*(self.samples(split).digest() for split in SPLITS), list(self.classes)])

    def as_splits(self) -> Splits:
        """Return train, held-out and test as the data of a single task."""
        return Splits(self.train, self.heldout, self.test, self.classes)


def build_splits(data: Target, task: str, adaptation: int, seed: int) -> SuiteSplits:
    """Build a task's data and set its adaptation split aside.

    Args:
        data: section whose `_target_` returns `Splits`.
        task: its name.
        adaptation: samples to draw from the train split.
        seed: of the draw.

    Raises:
        ConfigError: the target returns something else.
        DataError: the train split is too small, or two splits share a sample.
    """
    splits = build(data, f"tasks.{task}.data")
    if not isinstance(splits, Splits):
        raise ConfigError(f"tasks.{task}.data._target_={data.get('_target_')} must return soups.tasks.data.Splits.")
    total = len(splits.train)
    if adaptation >= total:
        raise DataError(
            f"The task {task} has {total} training samples, and {adaptation} of them were to be its adaptation split: lower "
            f"tasks.{task}.adaptation, or give it more data."
        )
    order = torch.randperm(total, generator=generator(seed, "adaptation", task))
    kept, aside = order[adaptation:].sort().values, order[:adaptation].sort().values
    found = SuiteSplits(splits.train.take(kept), splits.train.take(aside), splits.heldout, splits.test, splits.classes)
    check_disjoint({split: found.samples(split) for split in SPLITS}, f"the task {task}")
    return found
