"""Weights & Biases: one run for each soup, with its table, figures and lineage, beside the runs of its ingredients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soups.errors import ConfigError, did_you_mean, install

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
        raise ConfigError(f"wandb is not installed: {install('train')}, or run without it, tracking.mode=off.")
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


def ingredient_artifact(ingredient: Mapping[str, Any]) -> Any:
    """Return what stands for an ingredient in W&B's lineage: its record without its weights, which stay in the pool.

    The run that made it logs it and the soup's run uses it; equal content is one version there, whoever comes first.

    Args:
        ingredient: `fingerprint`, `weights` (their hash), `determinants` and `metrics` of the record.
    """
    import wandb

    kept = {key: ingredient[key] for key in ("fingerprint", "weights", "determinants", "metrics")}
    name = f"ingredient-{str(kept['fingerprint'])[:16]}"
    artifact = wandb.Artifact(name, type="ingredient", metadata={"weights": kept["weights"], **kept["metrics"]})
    with artifact.new_file("record.json") as file:
        json.dump(kept, file, indent=2, sort_keys=True)
    return artifact


def finish_ingredient(run: Any, ingredient: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Add the final numbers of a fine-tune to its run, and online its artifact.

    Args:
        run: of wandb; not ended.
        ingredient: see `ingredient_artifact`.
        seconds: by phase.
    """
    numbers = ingredient["metrics"].get("heldout", {})
    run.summary.update({f"heldout/{key}": value for key, value in numbers.items() if key != "count"})
    run.summary.update({f"seconds/{key}": value for key, value in seconds.items()})
    if not run.offline:
        run.log_artifact(ingredient_artifact(ingredient))


def log_soup(
    tracking: Mapping[str, Any],
    folder: Path,
    name: str,
    group: str,
    config: Mapping[str, Any],
    summary: Mapping[str, float],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    steps: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Path],
    lineage: Mapping[str, Any],
    weights: Path,
    page: Path | None = None,
    ingredients: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Log a finished soup as a run of its own.

    Args:
        tracking: `mode`, `project`, `entity`.
        folder: where wandb keeps its files.
        name: of the run; also its id, so that the same soup is one run however often it is made.
        group: shared with the ingredients' runs.
        config: the soup's settings.
        summary: final numbers.
        tables: header and rows by name.
        steps: decisions of the search in order, as history.
        figures: image files by name.
        lineage: which ingredients went in, with their hashes.
        weights: the soup's file; uploaded as an artifact when online.
        page: the HTML report.
        ingredients: records of the members (see `ingredient_artifact`); online, the soup's artifact descends from them.
    """
    if not require_wandb(str(tracking["mode"])):
        return
    import wandb

    settings = {**config, "lineage": dict(lineage)}
    with start_run(tracking, folder, name, name, group, "soup", settings) as run:
        run.define_metric("search/*", step_metric="search/step")
        for number, step in enumerate(steps, start=1):
            run.log({"search/step": number, **{f"search/{key}": value for key, value in step.items()}})
        for key, (columns, rows) in tables.items():
            run.log({f"tables/{key}": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        run.log({f"figures/{key}": wandb.Image(str(path)) for key, path in figures.items()})
        if page is not None:
            run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        run.summary.update(dict(summary))
        if not run.offline:
            for ingredient in ingredients:
                run.use_artifact(ingredient_artifact(ingredient))
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
                axis = part["x_label"]  # one axis for all curves over rounds, members or N
                run.define_metric(axis)
                run.define_metric(f"{part['title']}/*", step_metric=axis)
                for number, x in enumerate(part["x"]):
                    values = {f"{part['title']}/{key}": series[number] for key, series in part["series"].items()}
                    run.log({axis: x, **{key: value for key, value in values.items() if value is not None}})
            elif part["kind"] == "table":
                cells: list[list[Any]] = part["rows"]
                rows: Any = [[cell["value"] if isinstance(cell, dict) else cell for cell in row] for row in cells]
                run.log({f"tables/{part['title']}": wandb.Table(columns=part["columns"], data=rows)})
        run.log({f"figures/{key}": wandb.Image(str(path)) for key, path in figures.items()})
        run.summary["summary"] = page["summary"]
