"""From a pool to a finished soup: select on the held-out split, then look at the others, once, and write the folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from soups.errors import ConfigError
from soups.fitting.configuration import Configuration
from soups.fitting.environment import kind_of_processes, needs_processes
from soups.fitting.quiet import quiet
from soups.fitting.run import Run, run_of
from soups.reporting import SoupReport
from soups.soup_making.evaluator import SoupEvaluator
from soups.soup_making.ingredients import (
    Chosen,
    Reference,
    choose_ingredients,
    from_elsewhere,
    open_ingredients,
    reference_of,
)
from soups.soup_making.options import SoupOptions
from soups.soup_making.predictions import predict_all
from soups.soup_making.selection import select
from soups.soup_making.surroundings import surroundings
from soups.soup_making.writing import Finished, write
from soups.stores.files import fingerprint
from soups.worker import Message, run_in_processes

# Raise it when the same ingredients and settings would give another soup or another report.
SOUP_VERSION = 2


class SoupMessage(Message):
    """A soup to make.

    Attributes:
        configuration: all settings.
        folder: where the soup and its report go.
        fingerprint: of the soup.
        ingredients: fingerprints of what it is chosen from.
        remarks: what the report's warnings begin with.
    """

    configuration: Configuration
    folder: str
    fingerprint: str
    ingredients: list[str]
    remarks: list[str]


@dataclass(frozen=True)
class Rank:
    """The part that this process has among those that make a soup together."""

    device: torch.device | None = None
    first: bool = True


def options_of_run(run: Run) -> SoupOptions:
    """Return the checked section `soup`.

    Raises:
        ConfigError: there is none, or it holds a mistake.
    """
    if run.configuration.soup is None:
        raise ConfigError("There is no soup section: ask for a soup, +soup=greedy.")
    return SoupOptions.read(run.configuration.soup)


def make_soup(run: Run) -> tuple[SoupReport, Path]:
    """Make the soup of a run's settings from what the pool holds, or find it finished.

    Selection uses the held-out split alone: predictions on the test and OOD splits are made after it has ended.

    Returns:
        The report, and the folder with `soup.safetensors`, `report.json`, `results.csv`, the figures and the page.

    Raises:
        ConfigError: an unknown recipe, option or metric, or an empty pool.
        WeightsError: ingredients that do not belong together.
    """
    options = options_of_run(run)
    chosen = choose_ingredients(run, options, open_ingredients(run))
    name = soup_fingerprint(run, options, chosen, reference_of(run, options))
    folder = Path(run.layout.paths.output) / "soups" / f"{options.recipe}-{name[:8]}"
    if (folder / "report.json").is_file() and (folder / "soup.safetensors").is_file():
        return SoupReport.load(folder), folder
    message = SoupMessage(
        configuration=run.configuration,
        folder=str(folder),
        fingerprint=name,
        ingredients=[record.fingerprint for record in chosen.ingredients],
        remarks=chosen.remarks,
    )
    if needs_processes(run.layout.devices):
        run_in_processes(make_soup_in_ranks, message, reuse=kind_of_processes(run.layout.devices))
    else:
        _make(run, message, Rank())
    return SoupReport.load(folder), folder


def soup_fingerprint(run: Run, options: SoupOptions, chosen: Chosen, reference: Reference | None) -> str:
    """Return the hash of what decides a soup and its report."""
    determined: dict[str, Any] = {
        "cooking_version": SOUP_VERSION,
        "recipe": options.determinants(),
        "start": reference.weights_hash if reference else None,
        "ingredients": sorted(record.weights for record in chosen.ingredients),
        "names": sorted(record.short for record in chosen.ingredients) if from_elsewhere(run) else None,
        "reported": {name: samples.digest() for name, samples in run.splits.reported().items()},
    }
    return fingerprint(determined)


def make_soup_in_ranks(message: SoupMessage) -> None:
    """Make a soup under Fabric: this process starts the others, the ranks share the evaluations, rank 0 writes."""
    from lightning.fabric import Fabric

    quiet()
    run = run_of(message.configuration)
    devices = run.layout.devices
    fabric = Fabric(
        accelerator=devices.accelerator,
        devices=devices.devices,
        strategy=devices.strategy,
        num_nodes=devices.num_nodes,
    )
    fabric.launch()
    _make(run, message, Rank(fabric.device, fabric.is_global_zero))
    fabric.barrier("soup")


def _make(run: Run, message: SoupMessage, rank: Rank) -> None:
    options = options_of_run(run)
    if threads := run.layout.devices.threads:
        torch.set_num_threads(threads)
    pool = open_ingredients(run)
    evaluator = SoupEvaluator(run, options, pool, rank.device, rank.first)
    ingredients = evaluator.measured([pool.ingredient(name) for name in message.ingredients])
    reference = reference_of(run, options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not rank.first) as display:
        search = display.add_task("Scoring on the held-out split", total=None)
        evaluator.on_score = lambda: display.advance(search)
        selection = select(evaluator, ingredients, reference)
        display.update(search, total=evaluator.asked)
        began = time.perf_counter()
        references = _references(run, reference)
        predictions = predict_all(evaluator, ingredients, selection, references, display)
        finished = Finished.of(predictions)
        measured = time.perf_counter()
        around = display.add_task("Looking around the soup", total=None, visible=options.barrier or options.landscape)
        near = surroundings(evaluator, ingredients, selection.soup, references, lambda: display.advance(around))
    if not rank.first:
        return
    seconds = {**selection.seconds, "evaluation": measured - began}
    if options.barrier or options.landscape:
        seconds["barriers and landscape"] = time.perf_counter() - measured
    write(finished, near, message.fingerprint, Path(message.folder), message.remarks, seconds)


def _references(run: Run, reference: Reference | None) -> list[Reference]:
    """Return the models that the table begins with."""
    found: list[Reference] = []
    if not from_elsewhere(run):
        first = "linear probe" if run.asked.start and run.asked.start.probe else "pretrained, random head"
        found.append(Reference.of(first, run.probe))
        if run.base_model.record.weights != run.probe.record.weights:
            found.append(Reference.of("shared start", run.base_model))
    if reference is not None and reference.weights_hash not in {one.weights_hash for one in found}:
        found.append(reference)
    return found
