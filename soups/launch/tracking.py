"""Lightning's loggers, built from the `tracking` settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soups.launch.settings import Settings, is_first_process
from soups.tracking import group_name, require_wandb, start_run


def ingredient_logger(settings: Settings, name: str, determined: Settings) -> Any | None:
    """Return a WandbLogger for one ingredient, or None when tracking is off.

    Raises:
        soups.errors.ConfigError: an unknown mode, or wandb is not installed.
    """
    tracking = settings["tracking"]
    if not require_wandb(tracking["mode"]):
        return None
    from lightning.pytorch.loggers import WandbLogger

    run = None
    if is_first_process():  # the other ranks of a distributed run get Lightning's silent logger
        run = start_run(
            tracking,
            Path(settings["paths"]["output"]),
            name=f"ingredient-{name[:8]}",
            identity=name[:16],
            group=group_name(tracking["group"], settings["pool"]["path"]),
            job_type="ingredient",
            config={**settings, "determinants": determined},
        )
    return WandbLogger(experiment=run, log_model=False)


def close_logger(logger: Any | None, summary: Mapping[str, float]) -> None:
    """Write the run's final numbers and end it, so that the next run of this process gets one of its own."""
    if logger is None:
        return
    logger.experiment.summary.update(dict(summary))
    logger.experiment.finish()
