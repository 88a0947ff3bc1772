"""Lightning's loggers, built from the `tracking` settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soups.launch.settings import Settings
from soups.tracking import group_name, quiet_wandb, require_wandb


def ingredient_logger(settings: Settings, name: str, determined: Settings) -> Any | None:
    """Return a WandbLogger for one ingredient, or None when tracking is off.

    Raises:
        soups.errors.ConfigError: an unknown mode, or wandb is not installed.
    """
    tracking = settings["tracking"]
    if not require_wandb(tracking["mode"]):
        return None
    from lightning.pytorch.loggers import WandbLogger

    quiet_wandb(tracking["mode"])
    folder = Path(settings["paths"]["output"])
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        offline=tracking["mode"] == "offline",
        project=tracking["project"],
        entity=tracking["entity"],
        group=group_name(tracking["group"], settings["pool"]["path"]),
        name=f"ingredient-{name[:8]}",
        id=f"{name[:16]}",
        resume="allow",
        job_type="ingredient",
        save_dir=str(folder),
        config={**settings, "determinants": determined},
    )


def close_logger(logger: Any | None, summary: Mapping[str, float]) -> None:
    """Write the run's final numbers and end it, so that the next run of this process gets one of its own."""
    if logger is None:
        return
    logger.experiment.summary.update(dict(summary))
    logger.experiment.finish()
