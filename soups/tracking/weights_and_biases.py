"""Weights & Biases: one run for each soup, with its table, figures and lineage, beside the runs of its ingredients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soups.errors import ConfigError, did_you_mean

MODES = ("online", "offline", "off")


def require_wandb(mode: str) -> bool:
    """Tell whether runs are tracked.

    Raises:
        ConfigError: an unknown mode, or wandb is not installed.
    """
    mode = str(mode)
    if mode not in MODES:
        raise ConfigError(f"tracking.mode={mode}: {did_you_mean(mode, MODES)}")
    if mode == "off":
        return False
    if find_spec("wandb") is None:
        raise ConfigError("wandb is not installed: `pip install 'soups[train]'`, or run without it, tracking.mode=off.")
    return True


def start_run(
    tracking: Mapping[str, Any],
    folder: Path,
    name: str,
    identity: str,
    group: str,
    job_type: str,
    config: Mapping[str, Any],
) -> Any:
    """Start a wandb run and return it.

    Args:
        tracking: `mode` (online or offline), `project`, `entity`.
        folder: where wandb keeps its files.
        name: shown in the dashboard.
        identity: id of the run; a run that is made again under one id continues it.
        group, job_type: how the dashboard sorts runs.
        config: the run's settings.
    """
    import wandb

    offline = str(tracking["mode"]) == "offline"
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=tracking["project"],
        entity=tracking["entity"],
        dir=str(folder),
        mode="offline" if offline else "online",
        id=identity,
        name=name,
        group=group,
        job_type=job_type,
        resume=None if offline else "allow",
        config=dict(config),
        # Online, the link to the run is worth a line; offline, nothing is.
        settings=wandb.Settings(silent=offline),
    )


def group_name(group: str | None, pool: str) -> str:
    """Return the group of a sweep's runs: the one that was asked for, or the pool's name."""
    return group or Path(pool).name


def log_soup(
    tracking: Mapping[str, Any],
    folder: Path,
    name: str,
    group: str,
    config: Mapping[str, Any],
    summary: Mapping[str, float],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    steps: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Path],
    lineage: Mapping[str, Any],
    weights: Path,
) -> None:
    """Log a finished soup as a run of its own.

    Args:
        tracking: `mode`, `project`, `entity`.
        folder: where wandb keeps its files.
        name: of the run; also its id, so that the same soup is one run however often it is made.
        group: shared with the ingredients' runs.
        config: the soup's settings.
        summary: final numbers.
        columns, rows: the closing table.
        steps: decisions of the search in order, as history.
        figures: image files by name.
        lineage: which ingredients went in, with their hashes.
        weights: the soup's file; uploaded as an artifact when online.
    """
    mode = str(tracking["mode"])
    if not require_wandb(mode):
        return
    import wandb

    settings = {**config, "lineage": dict(lineage)}
    with start_run(tracking, folder, name, name, group, "soup", settings) as run:
        for step in steps:
            run.log({f"search/{key}": value for key, value in step.items()})
        run.log({"results": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        run.log({f"figures/{key}": wandb.Image(str(path)) for key, path in figures.items()})
        run.summary.update(dict(summary))
        if mode == "online":
            artifact = wandb.Artifact(name, type="soup", metadata=dict(lineage))
            artifact.add_file(str(weights))
            run.log_artifact(artifact)


def log_page(
    tracking: Mapping[str, Any],
    folder: Path,
    name: str,
    group: str,
    page: Mapping[str, Any],
    figures: Mapping[str, Path],
) -> None:
    """Log a protocol's report as a run of its own, its curves over their own x-axis (rounds, members, N).

    Args:
        tracking: `mode`, `project`, `entity`.
        folder: where wandb keeps its files.
        name: of the run; also its id, so that the same plan is one run however often it is reported.
        group: shared by the protocol's runs.
        page: a `soups.reporting.page.Page` as plain values.
        figures: image files by name.
    """
    if not require_wandb(str(tracking["mode"])):
        return
    import wandb

    config = {"configs": page["configs"], "lineage": page["lineage"], "environment": page["environment"]}
    with start_run(tracking, folder, name, name, group, "protocol", config) as run:
        for part in page["parts"]:
            if part["kind"] == "curves":
                axis = f"{part['title']}/{part['x_label']}"
                run.define_metric(f"{part['title']}/*", step_metric=axis)
                for number, x in enumerate(part["x"]):
                    values = {f"{part['title']}/{key}": series[number] for key, series in part["series"].items()}
                    run.log({axis: x, **{key: value for key, value in values.items() if value is not None}})
            elif part["kind"] == "table":
                rows = [[cell["value"] if isinstance(cell, dict) else cell for cell in row] for row in part["rows"]]
                run.log({f"tables/{part['title']}": wandb.Table(columns=part["columns"], data=rows)})
        run.log({f"figures/{key}": wandb.Image(str(path)) for key, path in figures.items()})
        run.summary["summary"] = page["summary"]
