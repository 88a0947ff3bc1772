"""Random numbers keyed by (seed, tensor, model, element): the same for an element wherever the chunk begins.

NumPy's PCG64DXSM (O'Neill, HMC-CS-2014-0905) can jump, so the numbers of elements `start:stop` are had without drawing those
before. One step gives four 16-bit numbers; a probability is rounded to a multiple of 2⁻¹⁶, and who divides by it divides by
the rounded one, so that expectations are exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soups.merging import kernels
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
    needed = (skip + count + _PER_STEP - 1) // _PER_STEP
    bits = np.random.PCG64DXSM(derive_seed(seed, "noise", key, model))
    bits.advance(first)
    return bits.random_raw(needed).astype("<u8", copy=False).view(np.uint16)[skip : skip + count]


@lru_cache(4096)
def _stream(seed: int, key: str, model: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the first state of a model's random numbers for a tensor, and the generator's increment, in halves."""
    state: Any = np.random.PCG64DXSM(derive_seed(seed, "noise", key, model)).state["state"]
    return np.array([half for name in ("state", "inc") for half in divmod(int(state[name]), 1 << 64)], np.uint64)


def rounded(probability: float) -> float:
    """Return the probability that masks really have: the nearest multiple of 2⁻¹⁶, but not 0 unless it is 0.

    >>> rounded(0.5), rounded(1e-9) > 0
    (0.5, True)
    """
    steps = round(min(max(probability, 0.0), 1.0) * _SCALE)
    return max(steps, int(probability > 0)) / _SCALE


def kept(probability: float, seed: int, key: str, model: int, start: int, count: int) -> kernels.Mask:
    """Return ones with probability `rounded(probability)` and zeros, for elements `start` to `start + count`.

    Args:
        probability: of a one; less than 1.
        seed: of the masks.
        key: the tensor's name.
        model: the model's number.
        start: the first element's place.
        count: how many.
    """
    limit = int(rounded(probability) * _SCALE)
    if limit >= _SCALE:
        return np.ones(count, np.uint8)
    return kept_each(np.array([limit], np.uint16), seed, key, model, start, count)


def kept_each(limits: kernels.Limits, seed: int, key: str, model: int, start: int, count: int) -> kernels.Mask:
    """Return ones with probability `limits` / 2¹⁶ and zeros; there is one limit for all elements or one for each."""
    if kernels.compiled(torch.float32, torch.device("cpu")):
        return kernels.Draw(_stream(seed, key, model), start, limits).mask(count)
    return (random_bits(seed, key, model, start, count) < limits).view(np.uint8)


def to_draw(probability: float, seed: int, key: str, model: int, start: int) -> kernels.Draw | None:
    """Return how compiled loops draw what `kept` returns; `None` if everything is kept."""
    limit = int(rounded(probability) * _SCALE)
    return None if limit >= _SCALE else to_draw_each(np.array([limit], np.uint16), seed, key, model, start)


def to_draw_each(limits: kernels.Limits, seed: int, key: str, model: int, start: int) -> kernels.Draw:
    """Return how compiled loops draw what `kept_each` returns."""
    return kernels.Draw(_stream(seed, key, model), start, limits)


def masked_(values: Tensor, mask: kernels.Mask) -> Tensor:
    """Multiply by a mask of bytes in place, and return the values."""
    return values.mul_(torch.from_numpy(mask).to(values.device, values.dtype))  # from bool it takes ten times as long
