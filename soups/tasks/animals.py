"""Silhouettes of ten animals, 28×28 pixels.

The images come from the `animal-mnist` wheel (MIT, in its packager's word): 10,000, of which some stand there more than once.
Its files are pickles; they are read by an unpickler that makes arrays of numbers and nothing else.
"""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from soups.errors import DataError
from soups.seeding import generator
from soups.tasks.data import Splits
from soups.tasks.images import TensorImages, each_once
from soups.tasks.wheels import ANIMALS, fetch

# What a pickled array of numbers is made of, under the names of NumPy 1 and 2.
_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


def animals(train: int = 2000, heldout: int = 500, test: int = 1500, split_seed: int = 0) -> Splits:
    """Return the animals task.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from the distinct images.
        split_seed: of the draw.

    Raises:
        DataError: too few images, or the data cannot be fetched.
    """
    images = _distinct()
    total = len(images)
    if min(train, heldout, test) < 1 or train + heldout + test > total:
        raise DataError(
            f"data.train + data.heldout + data.test = {train} + {heldout} + {test}, but there are {total} animals; each split "
            f"needs at least one image and together they cannot exceed that."
        )
    order = torch.randperm(total, generator=generator(split_seed, "split"))[: train + heldout + test]
    parts = [images.take(part) for part in order.split([train, heldout, test])]
    classes = tuple(str(label) for label in range(int(images.labels.max()) + 1))
    return Splits(parts[0], parts[1], parts[2], classes)


def _distinct() -> TensorImages:
    """Return each image once; images that stand there with two labels are left out."""
    folder = fetch(ANIMALS)
    pixels, labels = (read_array(folder / file) for file in ANIMALS.files)
    every = TensorImages(
        torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28),
        torch.from_numpy(labels.astype(np.int64)).flatten(),
    )
    return each_once(every)


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"The pickle asks for {module}.{name}; only arrays of numbers are read.")
        return super().find_class(module, name)


def read_array(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Read a gzipped pickle of one numeric array. Nothing that the file names is executed.

    Raises:
        DataError: it holds something else, or is damaged.
    """
    try:
        with gzip.open(path, "rb") as file:
            found: Any = _Arrays(file).load()
    except (pickle.UnpicklingError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove its folder, and it is fetched again.") from error
    if not isinstance(found, np.ndarray) or cast(Any, found).dtype.hasobject:
        raise DataError(f"{path} does not hold an array of numbers.")
    return found
