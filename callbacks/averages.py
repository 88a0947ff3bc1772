"""Several averages in one callback."""

from __future__ import annotations

from collections.abc import Callable

from soups.averaging.mean import Mean
from soups.averaging.units import RunLength
from soups.errors import ConfigError

from .base import Averaging


class Averages(Averaging):
    """Several averages, named by their keywords: `Averages(ema=EMA(decay=0.999), lawa=LAWA(k=10))`.

    Several callbacks on one Trainer come to the same; this is for where one callback is expected.

    Args:
        **callbacks: name to averaging callback.

    Raises:
        ConfigError: no callbacks, or callbacks that are an `Averages` themselves.
    """

    def __init__(self, **callbacks: Averaging) -> None:
        if not callbacks:
            raise ConfigError(
                "Averages() was given nothing to keep. Write, for instance, Averages(ema=EMA(), lawa=LAWA())."
            )
        for name, callback in callbacks.items():
            if isinstance(callback, Averages):
                raise ConfigError(
                    f"{name!r} is itself an Averages, whose callbacks have names of their own. Give all of them to one "
                    f"Averages(...)."
                )
            callback.settings.name = name
        self._callbacks = list(callbacks.values())
        super().__init__(self._callbacks[0].settings)

    def callbacks(self) -> list[Averaging]:
        """Return the callbacks it was made of."""
        return [inner for callback in self._callbacks for inner in callback.callbacks()]

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the averages of all its callbacks."""
        return {name: mean for callback in self.callbacks() for name, mean in callback.make(plan, covers).items()}
