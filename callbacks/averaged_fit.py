"""What is known of one fit of a module: its averages, the tensors that they follow, the steps so far."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import Tensor

from soups.averaging.mean import Mean
from soups.averaging.swapping import Swap, slots
from soups.averaging.units import RunLength, Schedule
from soups.errors import ConfigError
from soups.stores.averages import plain_name

from .finite import Finite
from .settings import Settings
from .tensors import Tensors


class Averager(Protocol):
    """What a fit asks of an averaging callback."""

    settings: Settings

    @property
    def includes_last(self) -> bool:
        """Whether the last step of the planned run is a point even when the spacing misses it."""
        ...

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the callback's averages by name."""
        ...

    def after_step(self, session: AveragedFit, trainer: pl.Trainer, *, epoch_end: bool) -> None:
        """Do more after the averages were updated."""
        ...

    def on_begin(self, session: AveragedFit, trainer: pl.Trainer, run: dict[str, Any] | None) -> None:
        """Get ready, when a resumed run's state is in place."""
        ...

    def run_state(self) -> dict[str, Any] | None:
        """Return plain values that a resumed run needs."""
        ...


@dataclass
class Tracked:
    """One average in a fit."""

    name: str
    settings: Settings
    mean: Mean
    schedule: Schedule
    last_point: int = -1
    # BatchNorm statistics measured for the average, and the number of points it had then.
    statistics: dict[str, Tensor] = field(default_factory=dict)
    measured_at: int = 0
    # The average as it was before a last point that only the end of the planned run has brought in.
    before_last: dict[str, Any] | None = None
    finite: Finite = field(default_factory=Finite)


class AveragedFit:
    """The state of one fit of one module under one or more averaging callbacks.

    Args:
        trainer: the Trainer.
        module: the module whose weights are averaged.
        averagers: the callbacks that say what is averaged.

    Raises:
        ConfigError: two averages of one name, or two that both want to be validated under the plain names.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, averagers: list[Averager]) -> None:
        self.trainer = trainer
        self.module = module
        self.averagers = averagers
        self.tracked: dict[str, Tracked] = {}
        self.steps = 0
        self.epochs = 0
        self.plan = RunLength()
        self.begun = False
        self.evaluating = False
        # What a checkpoint held, until the averages are there to take it; in evaluations, what is evaluated.
        self.loaded: dict[str, Any] | None = None
        self._tensors: Tensors | None = None
        self._swap: Swap | None = None
        self._check()

    def _check(self) -> None:
        names = [averager.settings.name for averager in self.averagers]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Two averages are called {name!r}. Give each a name of its own: EMA(name='slow').")
        for what in ("validate", "test", "predict"):
            plain = [m.settings.name for m in self.averagers if getattr(m.settings, what) == "average"]
            if len(plain) > 1:
                raise ConfigError(
                    f"{' and '.join(plain)} both ask for {what}='average', and only one can be evaluated under the plain "
                    f"names of the metrics. Use {what}='both' for all but one."
                )

    # The module's tensors -------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> Tensors:
        """What is averaged: trainable parameters and running statistics."""
        assert self._tensors is not None
        return self._tensors

    def follow(self) -> None:
        """Take note of layers and parameters that were exchanged, added or removed since the last time."""
        change = self._tensors.follow() if self._tensors is not None and not self.swapped else None
        if change is None:
            return
        weights = self.tensors.weights()
        joined = {name: weights[name].detach() for name in change.joined}
        for tracked in self.tracked.values():
            tracked.mean.follow(change.renamed, joined, change.gone)
            for old, new in change.renamed.items():
                if old == f"{new}_orig":  # pruning was made permanent
                    tracked.mean.zero(new, weights[new] == 0)
            tracked.statistics, tracked.measured_at, tracked.before_last = {}, 0, None
        if any(tracked.mean.count for tracked in self.tracked.values()):
            warnings.warn(
                f"The module has changed after {self.steps} steps ({change}). Averages go on: tensors that joined begin at "
                f"their present values, renamed ones keep their history.",
                stacklevel=2,
            )

    def weights(self) -> dict[str, Tensor]:
        """Return what is averaged, as it is now, this process's shards."""
        self.follow()
        return self.tensors.weights()

    def originals(self) -> dict[str, Tensor]:
        """Return the module's tensors of the same names, DTensors whole; before a fit has begun, all it has."""
        return self._tensors.originals() if self._tensors is not None else slots(self.module)

    @property
    def strict(self) -> bool:
        """Whether the module wants all of its tensors in a state dict."""
        return bool(getattr(self.module, "strict_loading", True))

    def tied(self) -> dict[str, str]:
        """Map names that repeat a tensor to the first name, by object identity as `named_parameters` sees it."""
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        everything = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in everything:
            name = plain_name(name)
            if first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
        return tied

    def check_finite(self, name: str) -> None:
        """Warn, once, of an average that holds values that are not finite where the raw weights have finite ones."""
        tracked = self.tracked.get(name)
        if tracked is not None and tracked.mean.count and not self.swapped:
            tracked.finite.check(tracked.name, tracked.mean, self.weights(), self.steps)

    @property
    def swapped(self) -> bool:
        """Whether the module holds an average now."""
        return self._swap is not None and self._swap.active

    def raw(self) -> dict[str, Tensor]:
        """Return the raw tensors that are out of the module now."""
        return self._swap.raw() if self._swap is not None else {}
