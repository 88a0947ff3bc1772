"""Run somebody's program up to its fit, without training and without a trace: no run of a logger, no folder, no process."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from torch.optim.optimizer import register_optimizer_step_pre_hook

from soups.errors import RunError
from soups.launch.own_program.ingredient import NO_FIT, seed_all
from soups.launch.own_program.interception import Fit, fits_go_to, is_tuning
from soups.launch.own_program.loggers import muted_loggers
from soups.launch.own_program.resolvers import registering_again
from soups.launch.own_program.task import ProgramTask


class _Seen(BaseException):
    """Ends the program's function when its fit has been seen."""


class _Trains(BaseException):
    """Ends the program's function when it trains outside `Trainer.fit`."""


@contextmanager
def rehearsal(
    program: ProgramTask, config: DictConfig, context: HydraContext, overrides: Sequence[str], counts: str
) -> Generator[Fit]:
    """Within the block there is the fit of a program, which does not run.

    The program's folder is a temporary one, which goes with the block; its loggers are there and write nothing.

    Args:
        program: the task function.
        config: of the sweep.
        context: Hydra's.
        overrides: that hold for all ingredients.
        counts: `ingredient.fit`: fits before the one with this number are left out.

    Raises:
        RunError: the program fails before its fit, trains without `Trainer.fit`, or does not come to a fit.
    """
    seen: list[Fit] = []
    number = 1 if counts == "last" else int(counts)
    calls = 0

    def receive(fit: Fit) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            seen.append(fit)
            raise _Seen

    def trains(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        if not is_tuning():
            raise _Trains(type(optimizer).__name__)

    def until_fit(task: DictConfig) -> None:
        seed_all("start")
        hook = register_optimizer_step_pre_hook(trains)
        try:
            with fits_go_to(receive), registering_again(), muted_loggers():
                program.function(task)
        except _Seen:
            pass
        finally:
            hook.remove()

    composed = context.config_loader.load_sweep_config(config, list(overrides))
    with tempfile.TemporaryDirectory(prefix="soups-rehearsal-") as folder:
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.sweep.subdir = "rehearsal"
            composed.hydra.job.num = 0
            composed.hydra.sweep.dir = folder
        try:
            done: JobReturn = run_job(
                task_function=until_fit, config=composed, job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir", hydra_context=context,
            )  # fmt: skip
        except _Trains as trained:
            raise RunError(
                f"The program takes a step of {trained} before it calls Trainer.fit of lightning.pytorch or "
                f"pytorch_lightning. A loop of its own makes no ingredient; if a Trainer.fit comes later and is the "
                f"ingredient, move the steps before it into a callback or into a program of their own."
            ) from None
        if done.status == JobStatus.FAILED:
            error: Any = done._return_value  # pyright: ignore[reportPrivateUsage]
            raise RunError(f"The program fails before its fit: {type(error).__name__}: {error}") from error
        if not seen:
            called = f" It calls it {calls} times, and ingredient.fit={counts}." if calls else ""
            raise RunError(f"{NO_FIT}{called}")
        seen[0].check()
        yield seen[0]
