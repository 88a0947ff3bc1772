"""What is tracked: Lightning's loggers for fine-tunes, built from the `tracking` settings, and a run for each soup."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soups.launch.settings import Settings, from_elsewhere, is_first_process, open_pool
from soups.reporting import Report, differences, flatten, plain_rows
from soups.stores.pool import Ingredient
from soups.tracking import finish_ingredient, group_name, log_soup, require_wandb, start_run


def ingredient_logger(settings: Settings, name: str, determined: Settings, title: str | None = None) -> Any | None:
    """Return a WandbLogger for one ingredient, or None when tracking is off.

    Args:
        settings: of its fit.
        name: its fingerprint; the run's id comes from it.
        determined: what decides its weights.
        title: shown in the dashboard; from the fingerprint when None.

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
            name=title or f"ingredient-{name[:8]}",
            identity=name[:16],
            group=group_name(tracking["group"], settings["pool"]["path"]),
            job_type="ingredient",
            config={**settings, "determinants": determined},
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
def member_run(settings: Settings, name: str, title: str, determined: Settings) -> Generator[Any | None]:
    """Within the block a protocol's member has a run of its own, in the protocol's group; the block gets its logger.

    Args:
        settings: of the member's fit.
        name: fingerprint of what it makes.
        title: shown in the dashboard.
        determined: what decides its weights.
    """
    logger = ingredient_logger(settings, name, determined, title)
    code = 1
    try:
        yield logger
        code = 0
    finally:
        if logger is not None:
            logger.experiment.finish(exit_code=code)


def summarise(logger: Any | None, numbers: Mapping[str, float]) -> None:
    """Write final numbers into a member's run, if there is one; the first of several processes does."""
    if logger is not None and is_first_process():
        logger.experiment.summary.update(dict(numbers))


def track_soup(settings: Settings, report: Report, folder: Path) -> None:
    """Log a finished soup with its tables, figures, page and lineage, if tracking is on."""
    if not require_wandb(str(settings["tracking"]["mode"])):
        return
    tried: list[Ingredient] = []
    if not from_elsewhere(settings):
        pool = open_pool(settings)
        tried = [pool.ingredient(name) for name in report.ingredients if name in pool]
    soup, best = report.row(report.soup), report.row("best single")
    has_ood = len(report.splits) > 2
    summary = {f"{split}/accuracy": value for split, value in soup.accuracy.items()}
    summary |= {f"{split}/loss": value for split, value in soup.loss.items()}
    summary |= {f"gain/{split}": value - best.accuracy[split] for split, value in soup.accuracy.items()}
    summary |= {"ood/accuracy": soup.ood, "gain/ood": soup.ood - best.ood} if has_ood else {}
    summary |= {"members": len(report.members), "ingredients": len(report.ingredients)}
    summary |= {f"seconds/{phase}": value for phase, value in report.seconds.items()}
    for row in report.rows:
        if row.kind != "ingredient":
            summary |= {f"{row.name}/{split}": value for split, value in row.accuracy.items()}
            summary |= {f"{row.name}/ood": row.ood} if has_ood else {}
    log_soup(
        settings["tracking"],
        Path(settings["paths"]["output"]),
        f"{report.recipe}-soup-{report.fingerprint[:8]}",
        group_name(settings["tracking"]["group"], str(settings["pool"]["path"])),
        settings,
        summary,
        {"results": plain_rows(report), "ingredients": _ingredients(tried, set(report.members))},
        [step.model_dump() for step in report.steps],
        {path.stem: path for path in sorted(folder.glob("*.png"))},
        report.lineage,
        folder / "soup.safetensors",
        page=folder / "report.html" if (folder / "report.html").is_file() else None,
        ingredients=[record.model_dump(mode="json") for record in tried if record.fingerprint in report.members],
    )


def _ingredients(tried: Sequence[Ingredient], members: set[str]) -> tuple[list[str], list[list[Any]]]:
    """Return a table of the ingredients: held-out numbers, whether they are in the soup, and the settings that differ."""
    keys, _ = differences({record.fingerprint: record.determinants for record in tried})
    rows: list[list[Any]] = []
    for record in tried:
        settings = flatten(record.determinants)
        numbers = record.metrics.get("heldout", {})
        values = [settings.get(key) for key in keys]
        plain = [value if isinstance(value, int | float | str | None) else str(value) for value in values]
        rows.append([record.short, record.fingerprint in members, numbers.get("accuracy"), numbers.get("loss"), *plain])
    return ["ingredient", "in the soup", "heldout_accuracy", "heldout_loss", *keys], rows
