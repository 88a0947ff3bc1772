"""One run of somebody's task function: give the module the shared start, let it train, and keep its weights."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from soups.errors import ConfigError, SoupError, WeightsError
from soups.fitting.environment import launched_outside, versions
from soups.fitting.training import ran_on
from soups.launch.own_program.configuration import Program
from soups.launch.own_program.direction import check_metric
from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.interception import Fit, fits_go_to
from soups.launch.own_program.module_weights import finished_weights, load_weights, weights_of
from soups.launch.own_program.resolvers import registering_again
from soups.launch.own_program.watching import ProgramProgress, WatchedMetrics
from soups.seeding import derive_seed
from soups.stores.pool import Ingredient, Pool
from soups.weights import Weights

NO_FIT = "The program ended without calling Trainer.fit of lightning.pytorch or pytorch_lightning, so there is no ingredient."


# Note of an ingredient whose program failed after the fit.
AFTERWARDS = "failed after the fit"


class NeedsProcesses(BaseException):
    """A fit on several devices, which runs in processes of its own; passes through the program's own `except Exception`."""


class _Refused(BaseException):
    """Carries an error of ours through the program's own `except Exception`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def make_ingredient(function: Callable[[DictConfig], Any], config: DictConfig, program: Program, alone: bool) -> None:
    """Run a task function in this process and put the weights of its fit into the pool.

    Where it calls `trainer.fit` several times, `ingredient.fit` says which call counts. By default that is the last one, of
    the module that the first one trained: warm-up and fine-tuning are one fit in two parts.

    Args:
        function: the task function.
        config: its configuration.
        program: its settings.
        alone: this process is not one of several ranks, and is not meant to start them.

    Raises:
        ConfigError: it does not call `trainer.fit`, or trains several modules and nothing says which counts.
        NeedsProcesses: `alone`, and the trainer asks for several devices.
        KeyboardInterrupt: the user stopped the fit.
    """
    pool = Pool(program.pool)
    shared = pool.start(program.spec.start)
    if shared is None:
        raise ConfigError(
            f"The pool {pool.url} does not hold the start {program.spec.start[:8]}; run the sweep that makes it."
        )
    run = _Run(program, pool, shared[1], alone)
    seed_all(program.fingerprint)
    with fits_go_to(run.receive), registering_again():
        try:
            function(config)
        except _Refused as refused:
            raise refused.error from None
        except Exception as error:  # the program's own, after its fit: a test that fails loses no weights
            run.keep(f"{type(error).__name__}: {error}")
            raise
    run.finish()


class _Run:
    """The fits of one run of a task function.

    Args:
        program: its settings.
        pool: of the ingredients.
        start: weights that all ingredients start from.
        alone: see `make_ingredient`.
    """

    def __init__(self, program: Program, pool: Pool, start: Mapping[str, Any], alone: bool) -> None:
        self._program, self._pool, self._start, self._alone = program, pool, start, alone
        self._count = 0
        self._seconds = 0.0
        self._module: Any = None
        self._found: tuple[Ingredient, Weights] | None = None

    def receive(self, fit: Fit) -> None:
        """Run one fit of the program; record it if it is the one that counts."""
        self._count += 1
        wanted = self._program.spec.fit
        if wanted != "last" and self._count != int(wanted):
            fit.run()
            return
        if self._alone and fit.processes > 1 and not launched_outside():
            raise NeedsProcesses
        try:
            if self._module is None:
                fit.check()
                fit.initial_weights()  # makes layers that come late
                self._give(fit)
            elif self._module is not fit.module:
                raise ConfigError(
                    f"The program fits several modules ({type(self._module).__name__}, then {type(fit.module).__name__}), so "
                    f"it is not clear which one is the ingredient. Say which call of trainer.fit counts: "
                    f"++ingredient.fit=1, 2, …"
                )
            self._module = fit.module
            self._train(fit)
        except SoupError as error:
            raise _Refused(error) from error

    def finish(self) -> None:
        """Record the fit that counts.

        Raises:
            ConfigError: there was none, or validation does not log the metric.
        """
        if self._module is None:
            fit = self._program.spec.fit
            called = f" It calls it {self._count} times, and ingredient.fit={fit}." if self._count else ""
            raise ConfigError(f"{NO_FIT}{called}")
        if self._found is not None:  # rank 0 has it
            self._pool.add(*self._found)

    def keep(self, why: str) -> None:
        """Record the fit so far, if there is one, of a program that failed after it."""
        if self._found is not None:
            record, weights = self._found
            notes = {**record.notes, AFTERWARDS: why}
            self._pool.add(record.model_copy(update={"notes": notes}), weights)

    def _give(self, fit: Fit) -> None:
        try:
            load_weights(fit.module, self._start)
        except RuntimeError as error:
            raise WeightsError(
                f"This run's model is not the shared start's: {str(error)[:300]}. What changes the architecture cannot be "
                f"part of a soup's search space."
            ) from error

    def _train(self, fit: Fit) -> None:
        history = WatchedMetrics(str(self._program.monitor))
        progress = ProgramProgress(self._pool, self._program.fingerprint)
        fit.trainer.callbacks.extend([history, progress])
        began = time.perf_counter()
        try:
            fit.run()
        finally:
            for callback in (history, progress):
                fit.trainer.callbacks.remove(callback)
        if fit.trainer.interrupted:
            raise KeyboardInterrupt
        self._seconds += time.perf_counter() - began
        # Now: what the program does next may load other weights into the module, a best checkpoint for a test.
        weights = finished_weights(fit.trainer, fit.module, self._program.spec.weights)
        if fit.trainer.is_global_zero:
            with _same_random_numbers():
                record = _measured(fit, weights, history, self._program, self._seconds, self._count)
                self._found = record, weights
        fit.trainer.strategy.barrier("ingredient")


def seed_all(*names: str) -> None:
    """Seed what a program that sets no seeds draws from, so that it, too, gives the same twice and on any launcher."""
    seed = derive_seed(0, *names)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _same_random_numbers() -> Generator[None]:
    """After the block, random numbers go on as if it had not been."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(arrays)


def _measured(
    fit: Fit, weights: Weights, history: WatchedMetrics, program: Program, seconds: float, fits: int
) -> Ingredient:
    """Validate the weights that a fit left; return their record.

    Raises:
        ConfigError: validation does not log the metric.
    """
    began = time.perf_counter()
    module = fit.module
    module.cpu()
    raw = weights_of(module) if program.spec.weights != "raw" else None
    evaluation = Evaluation(fit, program.spec.config, program.varied)
    metrics = evaluation.validate(None if raw is None else weights)
    if raw is not None:
        load_weights(module, raw)
    check_metric(metrics, program.monitor)
    assert evaluation.data is not None
    return Ingredient(
        fingerprint=program.fingerprint,
        determinants=program.spec.determinants(),
        start=program.spec.start,
        split=evaluation.data.digest,
        metrics={"heldout": metrics},
        durations={"fit": seconds, "total": seconds + time.perf_counter() - began},
        versions=versions(),
        layout=ran_on(fit.trainer),
        notes={"validation": evaluation.data.model_dump(mode="json"), "fits": fits},
        history=history.values,
    )
