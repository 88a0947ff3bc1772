"""Validate or test the averages beside the raw weights, with the module's own hooks.

After the raw weights' evaluation a second evaluation loop runs for each average, on the same data loaders. All of the
module's hooks are called as in any evaluation, so metrics computed by hand at the end of the epoch come out right too;
callbacks are not called again. Metrics are logged under their own name with `_<average>` added: `val/loss_ema`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
from collections.abc import Generator

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop  # pyright: ignore[reportPrivateUsage]
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from .quiet import SpareMetrics, logging_as, replaced


def evaluate_beside(trainer: pl.Trainer, module: pl.LightningModule, suffix: str, metrics: SpareMetrics) -> None:
    """Run the current evaluation once more, on whatever weights the module holds now, and log under other names.

    Args:
        trainer: at the end of an evaluation (`on_validation_end`, `on_test_end`).
        module: the module; its metrics' states are not touched.
        suffix: added to every logged name.
        metrics: where the module's metrics count meanwhile.
    """
    first = _loop(trainer)
    again = _EvaluationLoop(
        trainer, first._trainer_fn, first._stage, verbose=False, inference_mode=first.inference_mode
    )
    # The loaders are shared: nothing is loaded or shuffled anew that the first run would not have.
    again._data_source = first._data_source
    again._combined_loader = first._combined_loader
    again._max_batches = first._max_batches
    again._last_val_dl_reload_epoch = first._last_val_dl_reload_epoch
    connector = trainer._logger_connector
    with (
        isolate_rng(),
        metrics.in_use(module),
        logging_as(module, suffix),
        replaced(trainer, callbacks=[]),
        replaced(again, setup_data=lambda: None),
        _active(trainer, again),
        replaced(connector, _first_loop_iter=None, _current_fx=None),
    ):
        again.run()


def _loop(trainer: pl.Trainer) -> _EvaluationLoop:
    if trainer.state.fn == TrainerFn.FITTING:
        return trainer.fit_loop.epoch_loop.val_loop
    return trainer.test_loop if trainer.state.stage == RunningStage.TESTING else trainer.validate_loop


@contextlib.contextmanager
def _active(trainer: pl.Trainer, loop: _EvaluationLoop) -> Generator[None]:
    if trainer.state.fn == TrainerFn.FITTING:
        with replaced(trainer.fit_loop.epoch_loop, val_loop=loop):
            yield
    elif trainer.state.stage == RunningStage.TESTING:
        with replaced(trainer, test_loop=loop):
            yield
    else:
        with replaced(trainer, validate_loop=loop):
            yield
