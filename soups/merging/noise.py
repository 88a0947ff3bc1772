"""Random numbers keyed by (seed, tensor, model, element): the same for an element wherever the chunk begins.

NumPy's PCG64DXSM (O'Neill, HMC-CS-2014-0905) can jump, so the numbers of elements `start:stop` are had without drawing those
before. One step gives four 16-bit numbers; a probability is rounded to a multiple of 2⁻¹⁶, and who divides by it divides by
the rounded one, so that expectations are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soups.seeding import derive_seed

_PER_STEP = 4
_SCALE = 1 << 16


def random_bits(seed: int, key: str, model: int, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Return uniform 16-bit numbers for elements `start` to `start + count` of one model's tensor.

    >>> whole = random_bits(0, "w", 1, 0, 100)
    >>> bool((random_bits(0, "w", 1, 37, 20) == whole[37:57]).all())
    True
    """
    first, skip = divmod(start, _PER_STEP)
    bits = np.random.PCG64DXSM(derive_seed(seed, "noise", key, model))
    bits.advance(first)
    words = bits.random_raw((skip + count + 3) // 4)
    return words.astype("<u8", copy=False).view(np.uint16)[skip : skip + count]


def rounded(probability: float) -> float:
    """Return the probability that masks really have: the nearest multiple of 2⁻¹⁶, but not 0 unless it is 0.

    >>> rounded(0.5), rounded(1e-9) > 0
    (0.5, True)
    """
    steps = round(min(max(probability, 0.0), 1.0) * _SCALE)
    return max(steps, int(probability > 0)) / _SCALE


def bernoulli(probability: float, seed: int, key: str, model: int, start: int, count: int, *, like: Tensor) -> Tensor:
    """Return a mask of zeros and ones, one with probability `rounded(probability)`, in `like`'s dtype and device."""
    limit = int(rounded(probability) * _SCALE)
    if limit >= _SCALE:
        return torch.ones(count, dtype=like.dtype, device=like.device)
    mask = random_bits(seed, key, model, start, count) < np.uint16(limit)
    return torch.from_numpy(mask.view(np.uint8)).to(like.device, like.dtype)  # from bool it takes ten times as long


def bernoulli_each(limits: Tensor, seed: int, key: str, model: int, start: int, *, like: Tensor) -> Tensor:
    """Return a mask whose elements are one with probability `limits` / 2¹⁶, in `like`'s dtype and device.

    Args:
        limits: int32 in 1 … 65535, flat, on the CPU, from element `start` on.
        seed: of the masks.
        key: the tensor's name.
        model: the model's number.
        start: the first element.
        like: gives dtype and device.
    """
    draw = random_bits(seed, key, model, start, limits.numel())
    mask = draw < limits.numpy().astype(np.uint16)
    return torch.from_numpy(mask.view(np.uint8)).to(like.device, like.dtype)  # from bool it takes ten times as long
