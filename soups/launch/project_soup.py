"""The soup of somebody's own program: chosen by its validation loop, shown by its test loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soups.errors import ConfigError, StorageError, did_you_mean
from soups.evaluation.cautions import averaged_statistics, running_statistics, statistics_gaps
from soups.launch.fits import Evaluation, Fit
from soups.launch.kitchen import AVERAGE
from soups.launch.project import Project, belongs, check_metric
from soups.launch.settings import versions
from soups.recipes import RECIPES, Candidate, Soup, greedy, needs_of, options_of, uniform
from soups.reporting.report import soup_name
from soups.stores import read_safetensors, write_safetensors
from soups.stores.files import fingerprint, replacing_folder, write_json
from soups.stores.pool import Ingredient, Pool
from soups.weights import Weights, hash_weights

# Recipes that need no more than a score, and the start; the validation loop of a program gives no logits or gradients.
SCORED = tuple(name for name, recipe in RECIPES.items() if needs_of(recipe) <= {"start", "on_step"})


_UPDATE = (
    "Measure the soup's with your training data: torch.optim.swa_utils.update_bn(loader, model). The search here scored "
    "averages of statistics."
)


class ProjectRow(BaseModel):
    """One model of the table: what validation and, for some, the test loop say of it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    heldout: dict[str, float]
    test: dict[str, float] = {}
    note: str = ""


class ProjectReport(BaseModel):
    """A finished soup of somebody's program: `report.json` in its folder."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    recipe: str
    monitor: str
    mode: str
    start: str
    soup: str
    members: list[str]
    ingredients: list[str]
    rows: list[ProjectRow]
    seconds: dict[str, float]
    versions: dict[str, str]
    pool: str
    warnings: list[str] = []


def cook_project(project: Project, options: Mapping[str, Any], fit: Fit, output: Path) -> tuple[ProjectReport, Path]:
    """Make the soup of what the pool holds for a project, or find it finished.

    Selection uses the validation loop alone; the test loop runs after it has ended.

    Args:
        project: with its start and metric.
        options: the `soup` section.
        fit: of the program, for its module and data.
        output: the folder that gets `soups/<recipe>-<fingerprint>/`.

    Raises:
        ConfigError: an unknown recipe, an empty pool, a metric that is not logged or does not repeat.
        WeightsError: ingredients that do not belong together.
    """
    recipe = str(options["recipe"])
    if recipe not in SCORED:
        raise ConfigError(
            f"soup.recipe={recipe} is not for programs of your own: their validation loop gives a score alone. "
            f"{did_you_mean(recipe, SCORED)}"
        )
    if options.get("batchnorm", AVERAGE) != AVERAGE:
        raise ConfigError(
            f"soup.batchnorm={options['batchnorm']} is not for programs of your own: only their validation and test loops "
            f"are run. {_UPDATE}"
        )
    pool = Pool(project.pool)
    members = belongs(project, pool, str(options["foreign"]), [str(name) for name in options["exclude"]])
    (monitor,) = {check_metric(member.metrics["heldout"], project.monitor) for member in members}
    chosen_options = {key: options[key] for key in options_of(RECIPES[recipe]) if key in options}
    name = fingerprint(
        {
            "recipe": {"recipe": recipe, **chosen_options},
            "start": project.start,
            "monitor": [monitor, project.mode],
            "ingredients": sorted(member.weights for member in members),
        }
    )
    folder = output / "soups" / f"{recipe}-{name[:8]}"
    if (folder / "report.json").is_file() and (folder / "soup.safetensors").is_file():
        return _load(folder), folder
    evaluation = Evaluation(fit)
    sign = 1.0 if project.mode == "max" else -1.0
    validated: dict[str, dict[str, float]] = {}

    def validate(weights: Weights) -> dict[str, float]:
        key = hash_weights(weights)
        if key not in validated:
            validated[key] = evaluation.validate(weights)
        return validated[key]

    def score(weights: Weights) -> float:
        return sign * validate(weights)[monitor]

    _check_repeats(project, pool, members, evaluation, monitor)
    candidates = [
        Candidate(record.short, sign * record.heldout(monitor), lambda name=record.fingerprint: pool.weights(name))
        for record in members
    ]
    began = time.perf_counter()
    found = pool.start(project.start)
    assert found is not None
    _, start = found
    soups: dict[str, Soup] = {
        "uniform": uniform(candidates, score),
        "greedy": greedy(candidates, score, chosen_options.get("ties", "paper")),
    }
    if recipe not in soups:
        origin = {"start": Candidate("start", math.nan, lambda: start)} if "start" in needs_of(RECIPES[recipe]) else {}
        soups[recipe] = RECIPES[recipe](candidates, score, **origin, **chosen_options)
    searched = time.perf_counter()
    order = sorted(members, key=lambda record: (-sign * record.heldout(monitor), record.fingerprint))
    best = pool.weights(order[0].fingerprint)
    chosen = {"start": start, "best single": best, **{soup_name(key): soup.weights for key, soup in soups.items()}}
    notes = {
        "best single": order[0].short,
        **{soup_name(key): f"{len(soup.members)} averaged" for key, soup in soups.items()},
    }
    average = {
        key: math.fsum(record.metrics["heldout"][key] for record in members) / len(members)
        for key in members[0].metrics["heldout"]
    }
    rows = [
        *(ProjectRow(name=record.short, heldout=record.metrics["heldout"]) for record in order),
        ProjectRow(name="mean of ingredients", heldout=average),
        *(
            ProjectRow(name=key, heldout=validate(weights), test=evaluation.test(weights), note=notes.get(key, ""))
            for key, weights in chosen.items()
        ),
    ]
    soup = soups[recipe]
    by_short = {record.short: record.fingerprint for record in members}
    report = ProjectReport(
        fingerprint=name,
        recipe=recipe,
        monitor=monitor,
        mode=str(project.mode),
        start=project.start,
        soup=hash_weights(soup.weights),
        members=[by_short[short] for short in soup.members],
        ingredients=[record.fingerprint for record in members],
        rows=rows,
        seconds={"search": searched - began, "evaluation": time.perf_counter() - searched},
        versions=versions(),
        pool=pool.url,
        warnings=_warnings(pool, order),
    )
    with replacing_folder(folder) as scratch:
        lineage = report.model_dump(mode="json", exclude={"rows", "seconds"})
        write_safetensors(scratch / "soup.safetensors", soup.weights, {"lineage": json.dumps(lineage)})
        write_json(scratch / "report.json", report.model_dump(mode="json"))
    return report, folder


def _warnings(pool: Pool, members: Sequence[Ingredient]) -> list[str]:
    """Return what a careful reader must know of the ingredients."""
    read: list[Weights] = []
    for record in members:
        with pool.store(record.fingerprint) as store:
            read.append({name: store.read(name) for name in running_statistics(store)})
    gaps = {record.short: statistics_gaps(read[0], own) for record, own in zip(members, read, strict=True)}
    caution = averaged_statistics(gaps, remedy=_UPDATE)
    return [caution.message] if caution else []


def _check_repeats(
    project: Project, pool: Pool, members: Sequence[Ingredient], evaluation: Evaluation, monitor: str
) -> None:
    """Validate the worst ingredient, the best, and the worst again: a metric that remembers earlier validations shows.

    Raises:
        ConfigError: validation says another thing the second time, or than when the ingredients were made.
    """
    order = sorted(members, key=lambda record: record.heldout(monitor), reverse=project.mode == "min")
    tried = [order[0], order[-1], order[0]]
    values = [evaluation.validate(pool.weights(record.fingerprint))[monitor] for record in tried]
    then = [record.heldout(monitor) for record in tried]
    way_out = "Fix the split, or name another metric: ++ingredient.monitor=…"
    if not math.isclose(values[0], values[2], rel_tol=1e-5, abs_tol=1e-6):
        raise ConfigError(
            f"{monitor} of the same weights is {values[0]:.4f} at first and {values[2]:.4f} after another model was "
            f"validated, so it cannot choose a soup: it remembers earlier validations (a best-so-far), or the validation "
            f"data are drawn anew each time. {way_out}"
        )
    for record, before, now in zip(tried, then, values, strict=True):
        if not math.isclose(before, now, rel_tol=0.01, abs_tol=0.005):  # another machine may round one sample over
            raise ConfigError(
                f"{monitor} of ingredient {record.short} was {before:.4f} when it was made and is {now:.4f} now, so it "
                f"cannot choose a soup: the validation data have changed, or the metric remembers the fit. {way_out}"
            )


def _load(folder: Path) -> ProjectReport:
    path = folder / "report.json"
    try:
        read_safetensors(folder / "soup.safetensors")
        return ProjectReport.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise StorageError(
            f"{path} cannot be read as a soup's report ({error}). Remove {folder} and run the same command again."
        ) from error


def show(report: ProjectReport, folder: Path, console: Console) -> None:
    """Print the closing table and where the soup is."""
    tested = sorted({key for row in report.rows for key in row.test})
    others = [key for key in report.rows[0].heldout if key != report.monitor]
    table = Table("model", title=f"{soup_name(report.recipe)} by {report.monitor} ({report.mode})")
    for column in (report.monitor, *others, *tested, "note"):
        table.add_column(column, justify="left" if column == "note" else "right")
    for row in report.rows:
        numbers = [row.heldout.get(key) for key in (report.monitor, *others)] + [row.test.get(key) for key in tested]
        style = "bold" if row.name == soup_name(report.recipe) else ""
        table.add_row(
            row.name, *("" if number is None else f"{number:.4f}" for number in numbers), row.note, style=style
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(
        f"The {soup_name(report.recipe)} averages {len(report.members)} of {len(report.ingredients)} ingredients."
    )
    for warning in report.warnings:
        console.print(f"[yellow]![/] {escape(warning)}", highlight=False)
    console.print(f"[bold]{folder}/[/]  report.json, soup.safetensors", highlight=False)
    console.print(
        f"Load it: module.load_state_dict(safetensors.torch.load_file('{folder}/soup.safetensors'))", highlight=False
    )
