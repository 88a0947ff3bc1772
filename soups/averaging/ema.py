"""Exponential moving average of weights (Polyak averaging with forgetting).

a ← β a + (1 - β) θ after every k-th step with β = decayᵏ. Without a warm-up the first point keeps the weight βᵗ for ever
(8 % after 25,000 steps at decay 0.9999); the default divides that away exactly.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack, get_args

from soups.averaging import units
from soups.averaging.lerp import Lerp, lerp_
from soups.averaging.mean import MeanOptions
from soups.averaging.units import RunLength
from soups.errors import ConfigError
from soups.weights import Weights

Warmup = Literal["debias", "count", "power", "none"]


def decay_of(
    decay: float | None = None,
    half_life: str | float | None = None,
    sigma: str | float | None = None,
    plan: RunLength | None = None,
) -> float:
    """Return the decay β a step from whichever of the three was given; 0.999 if none was.

    Args:
        decay: β itself, in (0, 1).
        half_life: length after which a point's weight has halved: β = 2^(-1 / steps).
        sigma: standard deviation of the points' ages: β = exp(-1 / steps), exact for long averages.
        plan: what `"0.5ep"` and `"1%"` are resolved with; not needed for steps.

    >>> decay_of(half_life="1st"), round(decay_of(half_life="1%", plan=RunLength(steps=100_000)), 6)
    (0.5, 0.999307)

    Raises:
        ConfigError: more than one was given, or a value out of range.
    """
    given = {
        name: value
        for name, value in (("decay", decay), ("half_life", half_life), ("sigma", sigma))
        if value is not None
    }
    if len(given) > 1:
        raise ConfigError(f"An EMA has one length, and {' and '.join(given)} were given. Keep one of them.")
    if half_life is not None or sigma is not None:
        length = units.steps(half_life if half_life is not None else sigma or 0.0, plan)
        if length <= 0:
            raise ConfigError(f"{next(iter(given))}={next(iter(given.values()))!r} must be longer than nothing.")
        return math.exp(-(math.log(2) if half_life is not None else 1.0) / length)
    decay = 0.999 if decay is None else decay
    if not 0 < decay < 1:
        raise ConfigError(f"decay={decay} must lie between 0 and 1, as in 0.999; use SWA for an equal average.")
    return decay


class EMA(Lerp):
    """Exponential moving average.

    Args:
        decay: β a step; 0.999 if no length is given.
        half_life: length after which a point's weight has halved, in steps or as `"1000st"`.
        sigma: standard deviation of the points' ages, in steps or as `"1000st"`.
        interval: steps between updates; β becomes decay to this power.
        warmup: how the first points are weighed.
            "debias": weights proportional to βᵃᵍᵉ and summing to one, as by starting from zero and dividing by 1 - βᵗ
            (Adam, arXiv:1412.6980, section 3); the initial weights take no part.
            "count": β_t = min(β, (1 + t)/(10 + t)), t updates so far.
            "power": β_t = min(β, 1 - (1 + t)^(-2/3)).
            "none": starts as a copy of the first point, which keeps weight βᵗ.
        **keep: dtype, device and more; see `MeanOptions`.

    >>> import torch
    >>> ema = EMA(decay=0.5)
    >>> for value in (1.0, 4.0):
    ...     ema.update({"w": torch.tensor([value])})
    >>> ema.value()["w"]  # (0.5 · 1 + 1 · 4) / 1.5
    tensor([3.])

    Raises:
        ConfigError: more than one length, or one out of range.
    """

    kind = "EMA"

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: str | float | None = None,
        sigma: str | float | None = None,
        interval: int = 1,
        warmup: Warmup = "debias",
        **keep: Unpack[MeanOptions],
    ) -> None:
        super().__init__(**keep)
        self.decay = decay_of(decay, half_life, sigma)
        if interval < 1:
            raise ConfigError(f"interval={interval} must be at least 1 step.")
        if warmup not in get_args(Warmup):
            raise ConfigError(f"warmup={warmup!r} is none of {', '.join(get_args(Warmup))}.")
        self.interval = interval
        self.warmup: Warmup = warmup

    def _next_weight(self) -> float:
        return ema_weight(self.count, self.decay, interval=self.interval, warmup=self.warmup)

    def _scalars(self) -> dict[str, Any]:
        return {"decay": self.decay, "interval": self.interval, "warmup": self.warmup}


def ema_weight(count: int, decay: float, *, interval: int = 1, warmup: Warmup = "debias") -> float:
    """Return the weight w in a ← a + w (θ - a) of the point that follows `count` others.

    >>> ema_weight(0, 0.9), round(ema_weight(1, 0.9), 4), round(ema_weight(10**9, 0.9), 4)
    (1.0, 0.5263, 0.1)
    """
    if count == 0:
        return 1.0
    log_decay = interval * math.log(decay)
    if warmup == "debias":
        # (1 - β)/(1 - βᵗ) with t = count + 1, without cancellation where β is close to 1.
        return math.expm1(log_decay) / math.expm1((count + 1) * log_decay)
    if warmup == "count":
        log_decay = min(log_decay, math.log((1 + count) / (10 + count)))
    elif warmup == "power":
        log_decay = min(log_decay, math.log1p(-((1 + count) ** (-2 / 3))))
    return -math.expm1(log_decay)


def ema_update_(
    average: Weights, weights: Weights, count: int, decay: float = 0.999, *, warmup: Warmup = "debias"
) -> None:
    """Update an exponential average in place: the plain function behind `EMA`.

    Args:
        average: name to tensor; overwritten.
        weights: the same names and shapes; the new point.
        count: points taken in before this one; at 0 `average` becomes a copy.
        decay: β a step.
        warmup: see `EMA`.
    """
    lerp_(average, weights, ema_weight(count, decay, warmup=warmup))
