"""Stochastic rounding to bfloat16: small steps survive on average instead of being lost one by one.

An average moves by (1 - β)(θ - a) a step. In bfloat16 (8 bits of mantissa) such a step is mostly below half a unit in the
last place, and rounding to nearest keeps the average where it is for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_like(source: Tensor, generator: torch.Generator) -> Tensor:
    """Return what `round_stochastically_` takes: uniform integers below 2¹⁶, int32.

    Args:
        source: gives shape and device.
        generator: where the randomness comes from; on the device of `source`.
    """
    return torch.empty(source.shape, dtype=torch.int32, device=source.device).random_(0, 1 << 16, generator=generator)


def round_stochastically_(target: Tensor, source: Tensor, noise: Tensor) -> None:
    """Write float32 `source` into bfloat16 `target`, rounding up with the probability of the part that is cut off.

    The expected value of the result is `source`. Infinities and NaN stay what they are.

    Args:
        target: bfloat16, any shape; overwritten.
        source: float32, the same shape.
        noise: uniform integers below 2¹⁶, int32, the same shape.
    """
    bits = source.contiguous().view(torch.int32)
    # bfloat16 is the upper half of a float32: adding noise below 1 << 16 carries into it with the right probability.
    rounded = torch.bitwise_and(bits + noise, -(1 << 16)).view(torch.float32)
    target.copy_(torch.where(torch.isfinite(source), rounded, source))
