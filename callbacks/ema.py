"""Exponential moving average of the weights while training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Unpack

from soups.averaging import ema, units
from soups.averaging.mean import Mean
from soups.averaging.units import RunLength

from .base import Averaging
from .settings import Options, settings_of


class EMA(Averaging):
    """Keep an exponential moving average of the weights.

    Args:
        decay: β an optimizer step; 0.999 if no length is given.
        half_life: length after which a point's weight has halved: "1000st", "0.5ep" or "1%".
        sigma: standard deviation of the points' ages, in the same units.
        warmup: how the first points are weighed; see `soups.averaging.EMA`. By default the initial weights take no part.
        **options: see `Settings`. `every="8st"` updates every eighth step with β⁸; `name` is "ema" unless given.

    Raises:
        ConfigError: more than one length, an unknown option, or a length this run cannot resolve.
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life: str | None = None,
        sigma: str | None = None,
        warmup: ema.Warmup = "debias",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(settings_of(options, name="ema"))
        self.decay, self.half_life, self.sigma = decay, half_life, sigma
        self.warmup: ema.Warmup = warmup
        self._trial()

    def _trial(self) -> None:
        """Fail now, not when the run starts, over what does not depend on the run."""
        trial = RunLength(steps_per_epoch=10**6, steps=10**9, epochs=1000)
        ema.EMA(
            ema.decay_of(self.decay, self.half_life, self.sigma, trial), warmup=self.warmup, dtype=self.settings.dtype
        )

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the average for a run of the planned length."""
        decay = ema.decay_of(self.decay, self.half_life, self.sigma, plan)
        settings = self.settings
        interval = max(1, round(units.steps(settings.every, plan)))
        if plan.steps is not None and decay**plan.steps > 0.5:
            warnings.warn(
                f"The EMA {settings.name!r} reaches back further than this run is long: its half-life is more than "
                f"{plan.steps} steps. It will be close to the mean of all points; half_life='1%' would follow the run.",
                stacklevel=2,
            )
        mean = ema.EMA(
            decay,
            interval=interval,
            warmup=self.warmup,
            **settings.keep(covers),
        )
        return {settings.name: mean}
