"""Validate or test the averages beside the raw weights, with the module's own hooks.

After the raw weights' evaluation a second evaluation loop runs for each average, on the same data loaders. All of the
module's hooks are called as in any evaluation, so metrics computed by hand at the end of the epoch come out right too;
callbacks are not called again. To the module everything has its plain name; outside it every metric has `_<average>` added:
`val/loss_ema`. What its hooks change besides is the business of `branches`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from soups.errors import ConfigError

from .loaders import without_workers_state
from .loggers import loggers_replaced, renamed
from .quiet import replaced


def evaluate_beside(trainer: pl.Trainer, suffix: str) -> None:
    """Run the current evaluation once more, on whatever weights the module holds now, and log under other names.

    Args:
        trainer: at the end of an evaluation (`on_validation_end`, `on_test_end`); of either Lightning package.
        suffix: added to every logged name.

    Raises:
        ConfigError: a hook steps an optimizer of the run: it would train twice.
    """
    first = _loop(trainer)
    again = type(first)(trainer, first._trainer_fn, first._stage, verbose=False, inference_mode=first.inference_mode)
    # The loaders are shared: nothing is loaded or shuffled anew that the first run would not have.
    again._data_source = first._data_source
    again._combined_loader = without_workers_state(first._combined_loader)
    again._max_batches = first._max_batches
    again._last_val_dl_reload_epoch = first._last_val_dl_reload_epoch
    with (
        isolate_rng(),
        no_steps(trainer, suffix.removeprefix("_")),
        no_gradients(trainer),
        no_callbacks(trainer, type(first)),
        replaced(again, setup_data=lambda: None),
        _active(trainer, again),
        _metrics_as(trainer, again, suffix),
    ):
        again.run()


class _Recorded(dict[str, Any]):
    """A dictionary that remembers the values it was updated with."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.new: dict[str, Any] = {}

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take over values, and remember them."""
        self.new.update(*args, **kwargs)
        super().update(*args, **kwargs)


@contextlib.contextmanager
def _metrics_as(trainer: Any, loop: Any, suffix: str) -> Generator[None]:
    """Within the block metrics are logged under plain names inside the Trainer; outside, and afterwards, with `suffix`."""
    connector = trainer._logger_connector

    def rename(name: str) -> str:
        # Lightning adds to names: `_step` or `_epoch` where both are logged, and the loader's number.
        base, mark, number = name.partition("/dataloader_idx_")
        for item in loop._results.values():
            for ending in ("_step", "_epoch") if item.meta.forked else ():
                if base == f"{item.meta.name}{ending}":
                    return f"{item.meta.name}{suffix}{ending}{mark}{number}"
        return f"{base}{suffix}{mark}{number}"

    kinds = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    held = {kind: _Recorded(getattr(connector, kind)) for kind in kinds}
    log_metrics = connector.log_metrics
    with loggers_replaced(trainer, rename) as loggers:

        def log_renamed(metrics: dict[str, Any], step: int | None = None) -> None:
            connector._logged_metrics.update(metrics)
            with replaced(trainer, _loggers=loggers), replaced(connector, _logged_metrics={}):
                log_metrics(renamed(metrics, rename), step=step)

        with replaced(connector, log_metrics=log_renamed, _first_loop_iter=None, _current_fx=None, **held):
            yield
    for kind in kinds:
        getattr(connector, kind).update(renamed(held[kind].new, rename))


@contextlib.contextmanager
def no_steps(trainer: pl.Trainer, name: str) -> Generator[None]:
    """Within the block no optimizer of the run may step."""

    def refuse(*_: Any) -> None:
        raise ConfigError(
            f"The average {name!r} is evaluated beside the raw weights, and a hook of the module steps an optimizer of the "
            f"run meanwhile: it would train twice. Use validate='average' or 'raw' with this module, or step elsewhere."
        )

    handles = [optimizer.register_step_pre_hook(refuse) for optimizer in trainer.optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def no_gradients(trainer: pl.Trainer) -> Generator[None]:
    """Within the block parameters have no gradients; afterwards those of the accumulation that is under way."""
    groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    parameters = [*trainer.lightning_module.parameters(), *(one for group in groups for one in group)]
    held = {id(one): (one, one.grad) for one in parameters}
    for parameter, _ in held.values():
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held.values():
            parameter.grad = gradient


@contextlib.contextmanager
def no_callbacks(trainer: pl.Trainer, loop_type: type) -> Generator[None]:
    """Within the block callbacks are in their place, but no hook of theirs is called."""
    call: Any = sys.modules[_home(loop_type)].call  # type: ignore[attr-defined]
    original = call._call_callback_hooks

    def mute(owner: Any, *args: Any, **kwargs: Any) -> None:
        if owner is not trainer:
            original(owner, *args, **kwargs)

    with replaced(call, _call_callback_hooks=mute):
        yield


def _home(loop_type: type) -> str:
    """Return the module that defines a loop's class, in whichever of the two Lightning packages."""
    return next(kind.__module__ for kind in loop_type.__mro__ if kind.__name__ == "_EvaluationLoop")


def _loop(trainer: pl.Trainer) -> Any:
    if trainer.state.fn == "fit":
        return trainer.fit_loop.epoch_loop.val_loop
    return trainer.test_loop if trainer.state.stage == "test" else trainer.validate_loop


@contextlib.contextmanager
def _active(trainer: pl.Trainer, loop: Any) -> Generator[None]:
    if trainer.state.fn == "fit":
        with replaced(trainer.fit_loop.epoch_loop, val_loop=loop):
            yield
    elif trainer.state.stage == "test":
        with replaced(trainer, test_loop=loop):
            yield
    else:
        with replaced(trainer, validate_loop=loop):
            yield
