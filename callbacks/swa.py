"""Stochastic weight averaging while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from soups.averaging import swa
from soups.averaging.mean import Mean
from soups.averaging.units import RunLength

from .base import Averaging
from .settings import Common, settings_of


class SWA(Averaging):
    """Keep the equal mean of the weights at regular points (arXiv:1803.05407).

    The learning rate is not touched; `soups.averaging.constant_swa` and `cyclic_swa` are the paper's schedules, to be
    returned from `configure_optimizers`.

    Args:
        start: where the first point lies; the paper takes three quarters of the budget.
        every: spacing of the points; the last step of the planned run is a point in any case.
        **options: see `Settings`. `name` is "swa" unless given. BatchNorm networks want `buffers="reestimate"`.
    """

    def __init__(self, start: str = "75%", every: str = "1ep", **options: Unpack[Common]) -> None:
        super().__init__(settings_of(options, name="swa", start=start, every=every))

    @property
    def includes_last(self) -> bool:
        """The last step of the planned run is a point."""
        return True

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the average."""
        settings = self.settings
        mean = swa.SWA(**settings.keep(covers))
        return {settings.name: mean}
