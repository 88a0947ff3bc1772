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

from soups.averaging.checkpoint import load_averaged
from soups.averaging.mean import Mean
from soups.averaging.units import RunLength
from soups.errors import ConfigError
from soups.stores.averages import KEY

from . import saving
from .averaged_fit import AveragedFit, Averager
from .session import Session
from .settings import Settings
from .spool import Spool, in_worker


class Averaging(Callback):
    """Base of the averaging callbacks. A concrete one says which averages it keeps; all else happens here.

    Weights of the module are never changed for longer than an evaluation. After a fit the module holds the raw weights, as
    without the callback; `apply` or `soups.averaging.load_averaged` give the average.
    """

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._spool = Spool()
        self._session: Session | None = None
        self._leads = False

    # What a concrete callback says of itself -----------------------------------------------------------------------

    @abstractmethod
    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return this callback's averages by name, for a run of the planned length."""

    def callbacks(self) -> list[Averaging]:
        """Return the callbacks whose averages this one keeps: itself, or those it was made of."""
        return [self]

    @property
    def includes_last(self) -> bool:
        """Whether the last step of the planned run is a point even when the spacing misses it."""
        return False

    def after_step(self, session: AveragedFit, trainer: pl.Trainer, *, epoch_end: bool) -> None:
        """Do more after the averages were updated (write a snapshot)."""

    def on_begin(self, session: AveragedFit, trainer: pl.Trainer, run: dict[str, Any] | None) -> None:
        """Get ready, when the plan is known and a resumed run's state is in place.

        Args:
            session: the fit.
            trainer: its Trainer.
            run: what `run_state` returned when the checkpoint was written that is resumed; None in a new run.
        """

    def run_state(self) -> dict[str, Any] | None:
        """Return plain values that a resumed run needs beside the averages."""
        return None

    # For the user ---------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Lightning tells callbacks of one class apart by this."""
        return f"{type(self).__qualname__}[{','.join(averager.settings.name for averager in self.callbacks())}]"

    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """Return an average of the last fit as a full state dict, which the module loads strictly.

        Args:
            name: which average; needed only if there are several.

        Raises:
            ConfigError: there was no fit, or no average of this name.
            WeightsError: the average's start was never reached.
        """
        if self._session is None and self._spool.exists():
            return load_averaged(self._spool.path, self._name(name))
        return self._ready().state_dict(self._name(name))

    @contextmanager
    def applied(self, name: str | None = None) -> Generator[pl.LightningModule]:
        """Within the block the module holds the average; afterwards its own weights again, whatever happens."""
        session = self._ready()
        with session.holding(self._name(name)):
            yield session.module

    def apply(self, name: str | None = None) -> None:
        """Overwrite the module's own tensors with the average, for good. Tensors that are not averaged stay."""
        self._ready().write(self._name(name))

    def _ready(self) -> Session:
        if self._session is None:
            if self._spool.exists():
                raise ConfigError(
                    f"The fit ran in other processes, and {type(self).__name__} does not know the module in this one. Load "
                    f"the average into it: model.load_state_dict(callback.average())."
                )
            raise ConfigError(f"{type(self).__name__} holds no averages yet: run trainer.fit with it first.")
        return self._session

    def _name(self, name: str | None) -> str:
        return name or self.callbacks()[0].settings.name

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
        averagers: list[Averager] = [averager for callback in everyone for averager in callback.callbacks()]
        fresh = stage == "fit" or self._session is None or self._session.module is not pl_module
        if fresh:
            earlier = self._session
            self._session = Session(trainer, pl_module, averagers)
            if earlier is not None and earlier.module is pl_module and earlier.trainer is trainer:
                self._session.earlier = earlier.steps if trainer.current_epoch else None
        assert self._session is not None
        self._session.attach(trainer, evaluating=stage != "fit")
        if fresh and stage != "fit" and self._spool.exists():
            self._session.loaded = self._spool.read()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, now that weights are on their device and a resumed state was read."""
        if self._leads and self._session is not None:
            self._session.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the last validation has left, before training goes on."""
        if self._leads and self._session is not None:
            self._session.before_batch()

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

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the averages to the main process, if this is another one."""
        if self._leads and self._session is not None and in_worker(trainer):
            owner: Any = trainer
            content = saving.portable(self._session)
            if trainer.is_global_zero:
                for callback in owner.callbacks:
                    if isinstance(callback, Averaging):
                        callback._spool.write(content)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add averages of a fit in other processes to a checkpoint that the main process writes."""
        if self._session is None and self._spool.exists():
            checkpoint.setdefault(KEY, self._spool.read())

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
