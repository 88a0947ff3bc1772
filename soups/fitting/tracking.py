"""Tracked fits: Lightning's logger for a fit, built from the `tracking` settings, and the run's final numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from soups.fitting.configuration import Layout
from soups.fitting.environment import is_first_process
from soups.stores.pool import Ingredient
from soups.tracking import finish_ingredient, group_name, require_wandb, start_run


def fit_logger(layout: Layout, name: str, config: Mapping[str, Any], title: str | None = None) -> Any | None:
    """Return a WandbLogger for one fit, or None when tracking is off.

    Args:
        layout: with the `tracking` settings, the pool and the output folder.
        name: fingerprint of the fit; the run's id comes from it.
        config: shown beside the run.
        title: shown in the dashboard; from the fingerprint when None.

    Raises:
        soups.errors.ConfigError: an unknown mode, or wandb is not installed.
    """
    if not require_wandb(layout.tracking.mode):
        return None
    from lightning.pytorch.loggers import WandbLogger

    run = None
    if is_first_process():  # the other ranks of a distributed run get Lightning's silent logger
        run = start_run(
            layout.tracking.shallow(),
            Path(layout.paths.output),
            name=title or f"ingredient-{name[:8]}",
            identity=name[:16],
            group=group_name(layout.tracking.group, str(layout.pool.path)),
            job_type="ingredient",
            config=config,
        )
    return WandbLogger(experiment=run, log_model=False)


def close_logger(logger: Any | None, record: Ingredient | None) -> None:
    """Write the run's final numbers and end it, so that the next run of this process gets one of its own.

    Args:
        logger: of the run, or None when tracking is off.
        record: of the finished ingredient; None if it could not be kept.
    """
    if logger is None:
        return
    if record is not None:
        finish_ingredient(logger.experiment, record.model_dump(mode="json"), record.durations)
    logger.experiment.finish(exit_code=0 if record is not None else 1)


@contextlib.contextmanager
def tracked(layout: Layout, name: str, title: str, config: Mapping[str, Any]) -> Generator[Any | None]:
    """Within the block a fit of a protocol has a run of its own, in the protocol's group; the block gets its logger.

    Args:
        layout: of the fit.
        name: fingerprint of what it makes.
        title: shown in the dashboard.
        config: shown beside the run.
    """
    logger = fit_logger(layout, name, config, title)
    code = 1
    try:
        yield logger
        code = 0
    finally:
        if logger is not None:
            logger.experiment.finish(exit_code=code)


def summarise(logger: Any | None, numbers: Mapping[str, float]) -> None:
    """Write final numbers into a run, if there is one; the first of several processes does."""
    if logger is not None and is_first_process():
        logger.experiment.summary.update(dict(numbers))
