"""From a pool to a finished soup: select on the held-out split, then report on the others, once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from soups.errors import ConfigError, did_you_mean
from soups.launch.closing import Closing, close
from soups.launch.kitchen import AVERAGE, REESTIMATE, Kitchen
from soups.launch.members import Origin, choose_members, open_ingredients, origin_of
from soups.launch.quiet import quiet
from soups.launch.settings import (
    Settings,
    build_splits,
    device_count,
    from_elsewhere,
    launched_outside,
    processes,
    versions,
)
from soups.launch.shape import shapes
from soups.launch.start import device_for, ensure_probe, ensure_start
from soups.recipes import RECIPES, Soup, Step, needs_of, options_of
from soups.recipes.diwa import SELECTIONS
from soups.recipes.recipe import TIES
from soups.reporting import Decision, Report, compare_members, draw_all, page_of, save_page, write_csv
from soups.reporting.page import Part
from soups.stores import write_safetensors
from soups.stores.files import fingerprint, replacing_folder, write_json
from soups.stores.pool import Ingredient
from soups.tasks.data import Splits
from soups.weights import hash_weights
from soups.worker import Message, run_in_processes

METRICS = ("accuracy", "loss")
# What a soup's settings hold besides the options of its recipe.
COMMON = (
    "recipe",
    "metric",
    "foreign",
    "exclude",
    "start",
    "racing",
    "barrier",
    "landscape",
    "grid",
    "batchnorm",
    "batchnorm_batches",
)
# Raise it when the same ingredients and settings would give another soup or another report.
COOKING_VERSION = 2


class CookMessage(Message):
    """A soup to make.

    Attributes:
        settings: all of them.
        folder: where the soup and its report go.
        fingerprint: of the soup.
        ingredients: fingerprints of what it is chosen from.
        warnings: what the report begins with.
    """

    settings: Settings
    folder: str
    fingerprint: str
    ingredients: list[str]
    warnings: list[str]


def cook(settings: Settings) -> tuple[Report, Path]:
    """Make the soup of the settings from what the pool holds, or find it finished.

    Selection uses the held-out split alone: predictions on the test and OOD splits are made after it has ended.

    Returns:
        The report, and the folder with `soup.safetensors`, `report.json`, `results.csv`, the figures and the page.

    Raises:
        ConfigError: an unknown recipe, option or metric, or an empty pool.
        WeightsError: ingredients that do not belong together.
    """
    options = settings["soup"]
    check_options(settings)
    splits = build_splits(settings)
    pool = open_ingredients(settings, splits)
    members, told = choose_members(settings, pool, splits)
    origin = origin_of(settings, splits) if "start" in needs_of(RECIPES[options["recipe"]]) else None
    left_out = {"foreign", "exclude", "start"}
    if options.get("batchnorm", AVERAGE) == AVERAGE:  # as before there was a choice: finished soups are found
        left_out |= {"batchnorm", "batchnorm_batches"}
    determined = {
        "cooking_version": COOKING_VERSION,
        "recipe": {key: value for key, value in options.items() if key not in left_out},
        "start": origin.weights if origin else None,
        "ingredients": sorted(member.weights for member in members),
        "names": sorted(member.short for member in members) if from_elsewhere(settings) else None,
        "reported": {name: samples.digest() for name, samples in splits.reported().items()},
    }
    name = fingerprint(determined)
    folder = Path(settings["paths"]["output"]) / "soups" / f"{options['recipe']}-{name[:8]}"
    if (folder / "report.json").is_file() and (folder / "soup.safetensors").is_file():
        return Report.load(folder), folder
    job = CookMessage(
        settings=settings,
        folder=str(folder),
        fingerprint=name,
        ingredients=[member.fingerprint for member in members],
        warnings=told,
    )
    if device_count(settings) > 1 and not launched_outside():
        run_in_processes(cook_in_ranks, job, reuse=processes(settings))
    else:
        _cook(job, show_progress=True)
    return Report.load(folder), folder


def check_options(settings: Settings) -> None:
    """Check the soup's settings.

    Raises:
        ConfigError: an unknown recipe or option of it, metric, tie rule, or way with foreign ingredients.
    """
    options = settings["soup"]
    allowed: dict[str, Sequence[str]] = {
        "recipe": list(RECIPES),
        "metric": METRICS,
        "foreign": ("refuse", "skip"),
        "batchnorm": (AVERAGE, REESTIMATE),
        "ties": TIES,
        "selection": SELECTIONS,
    }
    for key, names in allowed.items():
        if key in options and options[key] not in names:
            raise ConfigError(f"soup.{key}={options[key]}: {did_you_mean(str(options[key]), names)}")
    if (racing := options.get("racing")) is not None and not 0 <= _number(racing) < 1:
        raise ConfigError(
            f"soup.racing={racing} must be null, 0 (exact) or a chance below 1 that the soup is another: 0.05."
        )
    if not _number(options.get("grid", 2)) >= 2:
        raise ConfigError(f"soup.grid={options['grid']} must be a whole number of at least 2.")
    batches = options.get("batchnorm_batches", 1)
    if not isinstance(batches, int) or batches < 1:
        raise ConfigError(f"soup.batchnorm_batches={batches} must be a whole number of at least 1.")
    known = options_of(RECIPES[options["recipe"]])
    for key in options:
        if key not in known and key not in COMMON:
            raise ConfigError(
                f"soup.{key} is no option of the recipe {options['recipe']}: {did_you_mean(key, [*known, *COMMON])}"
            )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def cook_in_ranks(job: CookMessage) -> None:
    """Cook under Fabric: this process starts the others, the ranks share the evaluations, rank 0 writes."""
    from lightning.fabric import Fabric

    quiet()
    trainer = job.settings["trainer"]
    fabric = Fabric(
        accelerator=trainer["accelerator"],
        devices=trainer["devices"],
        strategy=trainer["strategy"],
        num_nodes=trainer["num_nodes"],
    )
    fabric.launch()
    _cook(job, show_progress=fabric.is_global_zero, writes=fabric.is_global_zero, device=fabric.device)
    fabric.barrier("soup")


def _cook(
    job: CookMessage,
    show_progress: bool,
    writes: bool = True,
    device: torch.device | None = None,
) -> None:
    settings, options = job.settings, job.settings["soup"]
    recipe = str(options["recipe"])
    if threads := settings["trainer"].get("threads"):
        torch.set_num_threads(int(threads))
    splits = build_splits(settings)
    pool = open_ingredients(settings, splits)
    kitchen = Kitchen(settings, pool, device or device_for(settings), writes)
    members = kitchen.measured([pool.ingredient(name) for name in job.ingredients])
    origin = origin_of(settings, splits) if "start" in needs_of(RECIPES[recipe]) else None
    candidates = kitchen.candidates(members)
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as display:
        search = display.add_task("Scoring on the held-out split", total=None)
        kitchen.on_score = lambda: display.advance(search)
        tried: list[Tensor] = []

        def on_step(step: Step) -> None:
            tried.append(kitchen.latest_samples)

        # Greedy and uniform are in every report; what the recipe asks again costs nothing.
        plain = {key: value for key, value in options.items() if recipe == "greedy"}
        greedy = kitchen.run("greedy", candidates, plain, None, on_step)
        cooked = {"uniform": kitchen.run("uniform", candidates, {}, None), "greedy": greedy}
        evaluations = {"uniform": 1, "greedy": len(candidates)}
        if plain.get("racing") is not None:
            tried = []
        asked, since = kitchen.asked, time.perf_counter()
        if recipe not in cooked:
            cooked[recipe] = kitchen.run(recipe, candidates, options, origin)
            evaluations[recipe] = kitchen.asked - asked
        searched = time.perf_counter()
        display.update(search, total=kitchen.asked)
        starts = _starts(settings, splits, origin)
        closing = close(kitchen, members, cooked, recipe, starts, tried, display)
        measured = time.perf_counter()
        around = display.add_task("Looking around the soup", total=None, visible=_looks_around(options))
        shape = shapes(kitchen, members, cooked[recipe], starts, lambda: display.advance(around))
    if not writes:
        return
    seconds = {"search": searched - began, "evaluation": measured - searched}
    if _looks_around(options):
        seconds["barriers and landscape"] = time.perf_counter() - measured
    if len(cooked) == 3:
        seconds = {"search of the recipe alone": searched - since, **seconds}
    _write(job, members, cooked, closing, shape, kitchen, seconds, evaluations[recipe])


def _looks_around(options: Mapping[str, Any]) -> bool:
    return bool(options.get("barrier") or options.get("landscape"))


def _starts(settings: Settings, splits: Splits, origin: Origin | None) -> list[Origin]:
    """Return the models that the table begins with."""
    found: list[Origin] = []
    if not from_elsewhere(settings):
        probe, probe_weights = ensure_probe(settings, splits)
        start, start_weights = ensure_start(settings, splits)
        first = "linear probe" if settings["start"]["probe"] else "pretrained, random head"
        found.append(Origin(first, probe.weights, lambda: probe_weights))
        if start.weights != probe.weights:
            found.append(Origin("shared start", start.weights, lambda: start_weights))
    if origin is not None and origin.weights not in {start.weights for start in found}:
        found.append(origin)
    return found


def _write(
    job: CookMessage,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    closing: Closing,
    shape: tuple[list[Part], list[str]],
    kitchen: Kitchen,
    seconds: dict[str, float],
    evaluations: int,
) -> None:
    settings, options = job.settings, job.settings["soup"]
    recipe = str(options["recipe"])
    soup, sign = cooked[recipe], kitchen.sign
    by_short = {record.short: record for record in members}
    reported = kitchen.splits.reported()
    lineage = {
        "recipe": {key: value for key, value in options.items() if key not in ("foreign", "exclude")},
        "start": members[0].start,
        "split": kitchen.splits.hash(),
        "soup": hash_weights(soup.weights),
        "members": [
            {"fingerprint": by_short[short].fingerprint, "weights": by_short[short].weights} for short in soup.members
        ],
        "coefficients": soup.coefficients,
        "heldout": sign * soup.score,
        "model": settings["model"],
        "classes": list(kitchen.splits.classes),
        "versions": versions(),
        "pool": kitchen.pool.url,
    }
    report = Report(
        fingerprint=job.fingerprint,
        recipe=recipe,
        metric=kitchen.metric,
        mode="max" if kitchen.metric == "accuracy" else "min",
        members=[by_short[short].fingerprint for short in soup.members],
        ingredients=[record.fingerprint for record in members],
        splits={"heldout": len(kitchen.splits.heldout), **{key: len(samples) for key, samples in reported.items()}},
        rows=closing.rows,
        steps=[
            Decision(
                name=step.name,
                own_score=sign * step.own_score,
                soup_score=sign * step.soup_score,
                to_reach=None if math.isinf(step.to_reach) else sign * step.to_reach,
                kept=step.kept,
                action=step.action,
                evaluated=step.evaluated,
            )
            for step in soup.steps or cooked["greedy"].steps
        ],
        search=recipe if soup.steps else "greedy",
        lineage=lineage,
        seconds=seconds,
        coefficients=soup.coefficients,
        by_tensor=soup.by_tensor,
        path=closing.path,
        path_label=soup.path_label,
        differences=closing.differences,
        optimism=closing.optimism,
        diversity=closing.diversity,
        evaluations=evaluations,
        warnings=list(dict.fromkeys([*job.warnings, *closing.warnings, *shape[1]])),
        details=soup.details,
    )
    with replacing_folder(Path(job.folder)) as scratch:
        write_safetensors(scratch / "soup.safetensors", soup.weights, {"lineage": json.dumps(lineage)})
        write_json(scratch / "config.json", settings)
        write_csv(report, scratch / "results.csv")
        draw_all(report, scratch)
        report.save(scratch)
        heatmaps = compare_members(kitchen.pool, members, kitchen.digest("heldout"))
        save_page(page_of(report, members, [*heatmaps, *shape[0]]), scratch)
