"""Random numbers keyed by (seed, tensor, model, element): the same for an element wherever the chunk begins.

Philox (Salmon et al., SC 2011) is a function of a key and a counter, so the numbers of elements `start:stop` are had
without drawing those before. One counter step gives eight 32-bit numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soups.seeding import derive_seed

_PER_STEP = 8


def random_bits(seed: int, key: str, model: int, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Return uniform 32-bit numbers for elements `start` to `start + count` of one model's tensor.

    >>> whole = random_bits(0, "w", 1, 0, 100)
    >>> bool((random_bits(0, "w", 1, 37, 20) == whole[37:57]).all())
    True
    """
    first, skip = divmod(start, _PER_STEP)
    bits = np.random.Philox(key=derive_seed(seed, "noise", key, model), counter=first)
    words = np.random.Generator(bits).integers(0, 2**64 - 1, (skip + count + 1) // 2, dtype=np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view(np.uint32)[skip : skip + count]


def bernoulli(probability: float, seed: int, key: str, model: int, start: int, count: int, *, like: Tensor) -> Tensor:
    """Return a mask of zeros and ones, one with the given probability (to 2⁻³²), in `like`'s dtype and device."""
    limit = round(min(max(probability, 0.0), 1.0) * 2**32)
    if limit >= 2**32:
        return torch.ones(count, dtype=like.dtype, device=like.device)
    mask = random_bits(seed, key, model, start, count) < np.uint32(limit)
    return torch.from_numpy(mask).to(like.device, like.dtype)


def uniform(seed: int, key: str, model: int, start: int, count: int, *, like: Tensor) -> Tensor:
    """Return numbers in [0, 1), multiples of 2⁻²⁴, in `like`'s dtype and device."""
    bits = (random_bits(seed, key, model, start, count) >> np.uint32(8)).astype(np.float32)
    return torch.from_numpy(bits).mul_(2.0**-24).to(like.device, like.dtype)
