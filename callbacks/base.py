"""What all averaging callbacks share: the hooks of Lightning, handed to one session for all of them.

Several averaging callbacks on one Trainer work as one: the first of them leads, updates all averages together and saves them
under one key. They run before every other callback, so that whatever monitors a metric or saves a checkpoint sees the state
that the metric was computed on.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from soups.averaging.mean import Mean
from soups.averaging.units import Plan
from soups.errors import ConfigError

from .session import Session
from .settings import Settings


class Averaging(Callback):
    """Base of the averaging callbacks. A concrete one says which averages it keeps; all else happens here.

    Weights of the module are never changed for longer than an evaluation. After a fit the module holds the raw weights, as
    without the callback; `apply` or `soups.averaging.load_averaged` give the average.
    """

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._session: Session | None = None
        self._leads = False

    # What a concrete callback says of itself -----------------------------------------------------------------------

    @abstractmethod
    def make(self, plan: Plan, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return this callback's averages by name, for a run of the planned length."""

    def members(self) -> list[Averaging]:
        """Return the callbacks whose averages this one keeps: itself, or those it was made of."""
        return [self]

    @property
    def includes_last(self) -> bool:
        """Whether the last step of the planned run is a point even when the spacing misses it."""
        return False

    def after_step(self, session: Session, trainer: pl.Trainer, *, epoch_end: bool) -> None:
        """Do more after the averages were updated (write a snapshot)."""

    def on_begin(self, session: Session, trainer: pl.Trainer) -> None:
        """Get ready, when the plan is known and a resumed run's state is in place."""

    # For the user ---------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Lightning tells callbacks of one class apart by this."""
        return f"{type(self).__qualname__}[{','.join(member.settings.name for member in self.members())}]"

    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """Return an average of the last fit as a full state dict, which the module loads strictly.

        Args:
            name: which average; needed only if there are several.

        Raises:
            ConfigError: there was no fit, or no average of this name.
            WeightsError: the average's start was never reached.
        """
        return self._ready().state_dict(self._name(name))

    @contextmanager
    def applied(self, name: str | None = None) -> Generator[pl.LightningModule]:
        """Within the block the module holds the average; afterwards its own weights again, whatever happens."""
        session = self._ready()
        with session.holding(self._name(name)):
            yield session.module

    def apply(self, name: str | None = None) -> None:
        """Overwrite the module's weights with the average, for good."""
        session = self._ready()
        session.module.load_state_dict(session.state_dict(self._name(name)))

    def _ready(self) -> Session:
        if self._session is None:
            raise ConfigError(f"{type(self).__name__} holds no averages yet: run trainer.fit with it first.")
        return self._session

    def _name(self, name: str | None) -> str:
        return name or self.members()[0].settings.name

    def __getstate__(self) -> dict[str, Any]:
        # A session holds hooks and the trainer; a copy of the callback starts without one.
        return {**self.__dict__, "_session": None, "_leads": False}

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the other averaging callbacks and make one session for all."""
        owner: Any = trainer  # Lightning sets `callbacks` where type checkers do not see it
        everyone = [callback for callback in owner.callbacks if isinstance(callback, Averaging)]
        self._leads = everyone[0] is self
        if not self._leads:
            self._session = everyone[0]._session
            return
        others = [callback for callback in owner.callbacks if not isinstance(callback, Averaging)]
        owner.callbacks = [*everyone, *others]
        members = [member for callback in everyone for member in callback.members()]
        fresh = stage == "fit" or self._session is None or self._session.module is not pl_module
        if fresh:
            self._session = Session(trainer, pl_module, members)
        assert self._session is not None
        self._session.attach(trainer, evaluating=stage != "fit")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, now that weights are on their device and a resumed state was read."""
        if self._leads and self._session is not None:
            self._session.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the points that are due after this batch."""
        if self._leads and self._session is not None:
            self._session.after_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the epoch's point if the epoch ended without a last batch; measure and log."""
        if self._leads and self._session is not None:
            self._session.after_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if an average never started."""
        if self._leads and self._session is not None:
            self._session.end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put an average in place, if validation is to run on it."""
        if self._leads and self._session is not None:
            self._session.before_evaluation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the raw weights back, and evaluate averages beside them if asked."""
        if self._leads and self._session is not None:
            self._session.after_evaluation()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put an average in place, if the test is to run on it."""
        if self._leads and self._session is not None:
            self._session.before_evaluation()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the raw weights back, and test averages beside them if asked."""
        if self._leads and self._session is not None:
            self._session.after_evaluation()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put an average in place, if predictions are to come from it."""
        if self._leads and self._session is not None:
            self._session.before_evaluation()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the raw weights back."""
        if self._leads and self._session is not None:
            self._session.swap_out()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Bring the raw weights back before anything is saved."""
        if self._leads and self._session is not None:
            self._session.swap_out()
            self._session.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the optimizers; the averages stay, and are saved with any later checkpoint."""
        if self._leads and self._session is not None:
            self._session.swap_out()
            self._session.detach()
