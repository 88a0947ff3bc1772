"""What every kind of data has in common: labelled samples, honest splits, and batches that any number of processes share.

The split that selects (held-out) and the splits that only report (test, out-of-distribution) are named apart here, so
that the code that chooses cannot reach the numbers that judge it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from soups.errors import DataError
from soups.evaluation import Batch as Batch
from soups.seeding import generator
from soups.stores.files import fingerprint

# Which samples make a batch: (epoch, index) of each.
Keys = list[tuple[int, int]]


class Samples(ABC):
    """A sequence of labelled samples: images (`soups.tasks.images`) or texts (`soups.tasks.texts`).

    Attributes:
        labels: int64 (N,).
        augmented: whether training samples of this kind can be changed at random.
    """

    labels: Tensor
    augmented: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def digest(self) -> str:
        """Return a hash that changes when the samples or labels do."""

    @abstractmethod
    def identities(self) -> list[str]:
        """Return a string for each sample, equal for the same content, labels apart: splits are disjoint by these."""

    @abstractmethod
    def take(self, indices: Tensor) -> Samples:
        """Return the samples at `indices`, int64 (M,)."""


class Input(ABC):
    """What a model takes in: how samples become its batches."""

    @abstractmethod
    def dataset(
        self, samples: Samples, size: int, augment: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Dataset[Batch]:
        """Return samples as a data set that is indexed by `Keys`, so that one call makes one batch.

        Args:
            samples: of the kind that the model reads.
            size: of the input (`loader.size`): the side of an image in pixels, or the most tokens of a text.
            augment: settings of the random changes of training samples; None for evaluation.
            seed: of those changes.

        Raises:
            soups.errors.ConfigError: the model reads another kind of samples.
        """


@dataclass(frozen=True)
class Splits:
    """The data of one task.

    Attributes:
        train: what fine-tuning sees.
        heldout: what selection sees (hyper-parameters, greedy soups); never trained on.
        test: reported once, after selection.
        ood: out-of-distribution splits by name, reported once, after selection.
        classes: class names in the order of the logits.
    """

    train: Samples
    heldout: Samples
    test: Samples
    classes: tuple[str, ...]
    ood: dict[str, Samples] = field(default_factory=dict[str, Samples])

    def hash(self) -> str:
        """Return the split hash: ingredients are comparable when train, held-out and test splits and classes agree."""
        return fingerprint([self.train.digest(), self.heldout.digest(), self.test.digest(), list(self.classes)])

    def reported(self) -> dict[str, Samples]:
        """Return the splits that are reported after selection: test first, then the out-of-distribution ones."""
        return {"test": self.test, **self.ood}


def check_disjoint(parts: Mapping[str, Samples], task: str) -> None:
    """Check that no sample stands in two parts of a task's data.

    Args:
        parts: by name.
        task: its name, for the message.

    Raises:
        DataError: naming the parts, how many samples they share, and where the first one stands.
    """
    identities = {name: part.identities() for name, part in parts.items()}
    for (first, left), (second, right) in combinations(identities.items(), 2):
        places = {identity: number for number, identity in enumerate(left)}
        shared = [(places[identity], number) for number, identity in enumerate(right) if identity in places]
        if shared:
            raise DataError(
                f"The {first} and {second} splits of {task} share {len(shared)} sample(s): sample {shared[0][0]} of "
                f"{first} is sample {shared[0][1]} of {second}. What is chosen or fitted on one split cannot be judged on "
                f"another that holds the same samples: remove the copies from the data."
            )


class ShuffledBatches(Sampler[Keys]):
    """Training batches of one rank, each a list of (epoch, index).

    The batch size is global: with W processes each takes every W-th sample of every batch, so that the same settings
    train the same way on any number of devices. The last, partial batch of an epoch is dropped.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if length == 0:
            raise DataError("The train split is empty.")
        self.batch_size = min(batch_size, length)
        if self.batch_size < world:
            raise DataError(
                f"data.batch_size is {self.batch_size} over all devices together, but there are {world} devices: raise it "
                f"to at least {world}."
            )
        self.length, self.seed, self.rank, self.world, self.epoch = length, seed, rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[Keys]:
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch)).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size][self.rank :: self.world]]


class OrderedBatches(Sampler[Keys]):
    """Evaluation batches of one rank: every sample on exactly one rank, and the same number of batches on each.

    No sample is repeated to pad, so sums over ranks count each once; equal counts keep collectives in step. When the
    data are fewer than the ranks, the surplus ranks get no batches, and no collective may be called per batch. A batch
    holds at most `batch_size` samples (two, where a size of one does not divide evenly).
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.rank, self.world = length, rank, world
        self.batches = max(1, min(-(-length // (batch_size * world)), length // world))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[Keys]:
        for batch in torch.arange(self.length).tensor_split(self.batches * self.world)[self.rank :: self.world]:
            if len(batch):
                yield [(0, index) for index in batch.tolist()]
