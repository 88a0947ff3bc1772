"""From a pool to a finished soup: select on the held-out split, then report on the others, once."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.evaluation import Batch, ensemble, predict, score
from soups.launch.settings import (
    Settings,
    build_network,
    build_splits,
    device_count,
    launched_outside,
    open_pool,
    versions,
)
from soups.launch.start import device_for, ensure_probe, ensure_start, evaluation_batches
from soups.recipes import Candidate, Soup, Step, greedy, uniform
from soups.reporting import Decision, Report, Row, draw_all, write_csv
from soups.stores import write_safetensors
from soups.stores.files import fingerprint, replacing_folder, write_json
from soups.stores.pool import Ingredient, Pool
from soups.tasks.data import Splits
from soups.tasks.network import Network
from soups.weights import Weights, describe_mismatch, hash_weights

RECIPES = ("greedy", "uniform")
METRICS = ("accuracy", "loss")
# Raise it when the same ingredients and settings would give another soup or another report.
COOKING_VERSION = 1


def cook(settings: Settings) -> tuple[Report, Path]:
    """Make the soup of the settings from what the pool holds, or find it finished.

    Selection uses the held-out split alone: predictions on the test and OOD splits are made after it has ended.

    Returns:
        The report, and the folder with `soup.safetensors`, `report.json`, `results.csv` and the figures.

    Raises:
        ConfigError: an unknown recipe or metric, or an empty pool.
        WeightsError: ingredients that do not belong together.
    """
    options = settings["soup"]
    check_options(settings)
    pool = open_pool(settings)
    members = choose_members(settings, pool)
    determined = {
        "cooking_version": COOKING_VERSION,
        "recipe": {key: options[key] for key in ("recipe", "metric", "ties")},
        "ingredients": sorted(member.weights for member in members),
        "reported": {name: samples.digest() for name, samples in build_splits(settings).reported().items()},
    }
    name = fingerprint(determined)
    folder = Path(settings["paths"]["output"]) / "soups" / f"{options['recipe']}-{name[:8]}"
    if (folder / "report.json").is_file() and (folder / "soup.safetensors").is_file():
        return Report.load(folder), folder
    job = {"name": name, "fingerprints": [member.fingerprint for member in members]}
    if device_count(settings) > 1 and not launched_outside():
        from soups.launch.worker import run_in_processes

        run_in_processes("cook", settings, False, members=job, folder=str(folder))
    else:
        _cook(settings, job, folder, show_progress=True)
    return Report.load(folder), folder


def check_options(settings: Settings) -> None:
    """Check the soup's settings.

    Raises:
        ConfigError: an unknown recipe, metric, tie rule, or way with foreign ingredients.
    """
    options = settings["soup"]
    allowed = {"recipe": RECIPES, "metric": METRICS, "foreign": ("refuse", "skip"), "ties": ("paper", "official")}
    for key, names in allowed.items():
        if options[key] not in names:
            raise ConfigError(f"soup.{key}={options[key]}: {did_you_mean(str(options[key]), names)}")


def choose_members(settings: Settings, pool: Pool) -> list[Ingredient]:
    """Return the ingredients that belong to the settings' task and start, in the order of their fingerprints.

    Raises:
        ConfigError: there are none.
        WeightsError: some differ in start, architecture or split, and `soup.foreign` is "refuse".
    """
    members, count = _sort_out(settings, pool)
    if not count:
        raise ConfigError(
            f"The pool {pool.url} holds no ingredients to cook. Fine-tune some: sweep.size=8, or "
            f"`python train.py -m optimizer.lr=1e-4,3e-4`."
        )
    if not members:
        raise ConfigError(f"None of the {count} ingredients in {pool.url} has this start, architecture and split.")
    return members


def refuse_foreign(settings: Settings) -> None:
    """Check, before anything is trained, that what the pool holds could be averaged with what is to come.

    Raises:
        WeightsError: some ingredients differ in start, architecture or split, and `soup.foreign` is "refuse".
    """
    _sort_out(settings, open_pool(settings))


def _sort_out(settings: Settings, pool: Pool) -> tuple[list[Ingredient], int]:
    """Return the ingredients that fit, and how many were looked at."""
    excluded = tuple(str(name) for name in settings["soup"]["exclude"])
    found = [record for record in pool.ingredients() if not (excluded and record.fingerprint.startswith(excluded))]
    if not found:
        return [], 0
    splits = build_splits(settings)
    start, weights = ensure_start(settings, splits)
    expected = {"start": start.weights, "architecture": start.architecture, "split": splits.hash()}
    problems: dict[str, list[str]] = {}
    for record in found:
        if differs := [key for key, value in expected.items() if getattr(record, key) != value]:
            problems[record.fingerprint] = [_how(key, record, start, weights, pool) for key in differs]
    if problems and settings["soup"]["foreign"] == "refuse":
        kinds = Counter("; ".join(reasons) for reasons in problems.values())
        lines = [
            f"{', '.join(name[:8] for name in problems if '; '.join(problems[name]) == kind)}: {kind}" for kind in kinds
        ]
        raise WeightsError(
            f"{len(problems)} of the {len(found)} ingredients in {pool.url} cannot be averaged with the others: "
            f"{' | '.join(lines)}. Use a pool for each task and start (pool.path=…), leave them out "
            f"(soup.exclude=[{','.join(name[:8] for name in list(problems)[:3])}], or soup.foreign=skip), or give the "
            f"settings they were made with."
        )
    return [record for record in found if record.fingerprint not in problems], len(found)


def _how(key: str, record: Ingredient, start: Ingredient, weights: Weights, pool: Pool) -> str:
    """Say how an ingredient differs, in settings where they are known."""
    if key == "architecture":
        with contextlib.suppress(WeightsError):
            if problem := describe_mismatch(weights, pool.weights(record.fingerprint)):
                return f"another architecture ({problem})"
        return "another architecture (tensors of other dtypes)"
    sections = ("data",) if key == "split" else ("model", "start", "loader")
    changes = [
        f"{name}.{leaf}: {record.config.get(name, {}).get(leaf)!r} there, {start.config[name].get(leaf)!r} here"
        for name in sections
        for leaf in sorted({*record.config.get(name, {}), *start.config[name]})
        if record.config.get(name, {}).get(leaf) != start.config[name].get(leaf)
        and not (name == "loader" and leaf != "size")
    ]
    what = {"split": "another split", "start": "another start"}[key]
    return f"{what} ({', '.join(changes) or 'its hash differs'})"


def cook_in_ranks(settings: Settings, job: dict[str, Any], folder: Path) -> None:
    """Cook under Fabric: this process starts the others, the ranks share the evaluations, rank 0 writes."""
    from lightning.fabric import Fabric

    trainer = settings["trainer"]
    fabric = Fabric(
        accelerator=trainer["accelerator"],
        devices=trainer["devices"],
        strategy=trainer["strategy"],
        num_nodes=trainer["num_nodes"],
    )
    fabric.launch()
    _cook(
        settings, job, folder, show_progress=fabric.is_global_zero, writes=fabric.is_global_zero, device=fabric.device
    )
    fabric.barrier("soup")


class _Kitchen:
    """A network and the splits, with predictions that are made once and kept in the pool."""

    def __init__(self, settings: Settings, pool: Pool, device: torch.device, writes: bool) -> None:
        self.settings, self.pool, self.device, self.writes = settings, pool, device, writes
        self.splits: Splits = build_splits(settings)
        self.network: Network = build_network(
            {**settings, "model": {**settings["model"], "pretrained": False}}, len(self.splits.classes)
        )
        self.network.module.to(device)
        self._batches: dict[str, list[Batch]] = {}
        self._digests: dict[str, str] = {}
        self.evaluations = 0

    def logits(self, weights: Weights, split: str, weights_hash: str | None = None) -> Tensor:
        """Return logits (N, classes) of some weights on a split; stored in the pool when their hash is given."""
        samples = {"heldout": self.splits.heldout, **self.splits.reported()}[split]
        if split not in self._digests:
            self._digests[split] = samples.digest()
        if weights_hash and (stored := self.pool.predictions(weights_hash, self._digests[split])) is not None:
            return stored
        if split not in self._batches:
            self._batches = {key: value for key, value in self._batches.items() if key == "heldout"}
            self._batches[split] = evaluation_batches(self.settings, samples, self.network)
        self.network.module.load_state_dict(weights)
        logits = predict(self.network.module, self._batches[split], self.device)
        self.evaluations += 1
        if weights_hash and self.writes:
            self.pool.add_predictions(weights_hash, self._digests[split], logits)
        return logits

    def labels(self, split: str) -> Tensor:
        """Return the labels of a split, (N,)."""
        return {"heldout": self.splits.heldout, **self.splits.reported()}[split].labels


def _cook(
    settings: Settings,
    job: Mapping[str, Any],
    folder: Path,
    show_progress: bool,
    writes: bool = True,
    device: torch.device | None = None,
) -> None:
    options = settings["soup"]
    if threads := settings["trainer"].get("threads"):
        torch.set_num_threads(int(threads))
    pool = open_pool(settings)
    kitchen = _Kitchen(settings, pool, device or device_for(settings), writes)
    members = [pool.ingredient(name) for name in job["fingerprints"]]
    sign = 1.0 if options["metric"] == "accuracy" else -1.0

    def held_out(weights: Weights) -> float:
        numbers = score(kitchen.logits(weights, "heldout"), kitchen.labels("heldout"))
        return sign * float(getattr(numbers, options["metric"]))

    candidates = [
        Candidate(
            record.short,
            sign * record.heldout(options["metric"]),
            lambda name=record.fingerprint: pool.weights(name),
        )
        for record in members
    ]
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as display:
        search = display.add_task("Searching the greedy soup", total=len(candidates))

        def on_step(step: Step) -> None:
            display.advance(search)

        cooked = {
            "greedy": greedy(candidates, held_out, options["ties"], on_step),
            "uniform": uniform(candidates, held_out),
        }
        searched = time.perf_counter()
        rows = _rows(kitchen, settings, members, cooked, options["metric"], display)
    if not writes:
        return
    seconds = {"search": searched - began, "evaluation": time.perf_counter() - searched}
    _write(settings, job["name"], folder, members, cooked, rows, kitchen, seconds, sign)


def _rows(
    kitchen: _Kitchen,
    settings: Settings,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    metric: str,
    display: Progress,
) -> list[Row]:
    """Evaluate everything on every split, after selection has ended."""
    pool = kitchen.pool
    splits = ["heldout", *kitchen.splits.reported()]
    probe, probe_weights = ensure_probe(settings, kitchen.splits)
    start, start_weights = ensure_start(settings, kitchen.splits)
    first = "linear probe" if settings["start"]["probe"] else "pretrained, random head"
    models: list[tuple[str, str, str, Callable[[], Weights]]] = [(first, "start", probe.weights, lambda: probe_weights)]
    if start.weights != probe.weights:
        models.append(("shared start", "start", start.weights, lambda: start_weights))
    models += [
        (record.short, "ingredient", record.weights, lambda name=record.fingerprint: pool.weights(name))
        for record in members
    ]
    models += [
        (f"{name} soup", "soup", hash_weights(soup.weights), lambda soup=soup: soup.weights)
        for name, soup in sorted(cooked.items(), reverse=True)
    ]
    bar = display.add_task("Evaluating on all splits", total=len(models) * len(splits))
    logits: dict[str, dict[str, Tensor]] = {name: {} for name, *_ in models}
    for split in splits:
        for name, _, weights_hash, load in models:
            logits[name][split] = kitchen.logits(_Lazy(load), split, weights_hash)
            display.advance(bar)

    def row(name: str, kind: str, values: Mapping[str, Tensor], note: str = "") -> Row:
        numbers = {split: score(values[split], kitchen.labels(split)) for split in splits}
        return Row(
            name=name,
            kind=kind,
            accuracy={split: number.accuracy for split, number in numbers.items()},
            loss={split: number.loss for split, number in numbers.items()},
            note=note,
        )

    notes = _notes(cooked["greedy"], metric)
    single = [row(record.short, "ingredient", logits[record.short], notes[record.short]) for record in members]
    order = [step.name for step in cooked["greedy"].steps]
    single.sort(key=lambda line: order.index(line.name))
    average = Row(
        name="mean of ingredients",
        kind="mean",
        accuracy={split: _average([line.accuracy[split] for line in single]) for split in splits},
        loss={split: _average([line.loss[split] for line in single]) for split in splits},
    )
    best = single[0].model_copy(update={"name": "best single", "kind": "best", "note": single[0].name})
    together = {split: ensemble([logits[record.short][split] for record in members]) for split in splits}
    soups = [
        row(name, "soup", logits[name], f"{len(cooked[name.split()[0]].members)} averaged")
        for name, kind, *_ in models
        if kind == "soup"
    ]
    return [
        *(row(name, kind, logits[name]) for name, kind, *_ in models if kind == "start"),
        *single,
        average,
        best,
        *soups,
        row("logit ensemble", "ensemble", together, f"{len(members)} models at inference"),
    ]


class _Lazy(Mapping[str, Tensor]):
    """Weights that are read when a model needs them: stored predictions need none."""

    def __init__(self, load: Callable[[], Weights]) -> None:
        self._load = load
        self._weights: Weights | None = None

    def _get(self) -> Weights:
        if self._weights is None:
            self._weights = self._load()
        return self._weights

    def __getitem__(self, key: str) -> Tensor:
        return self._get()[key]

    def __iter__(self):
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes(soup: Soup, metric: str) -> dict[str, str]:
    """Say of each ingredient whether greedy kept it, and why not."""
    notes: dict[str, str] = {}
    for number, step in enumerate(soup.steps):
        if step.kept:
            notes[step.name] = "kept: the best" if number == 0 else "kept"
        elif metric == "accuracy":
            notes[step.name] = f"left out: soup {100 * step.soup_score:.2f} < {100 * step.to_reach:.2f}"
        else:
            notes[step.name] = f"left out: soup loss {-step.soup_score:.4f} > {-step.to_reach:.4f}"
    return notes


def _write(
    settings: Settings,
    name: str,
    folder: Path,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    rows: list[Row],
    kitchen: _Kitchen,
    seconds: dict[str, float],
    sign: float,
) -> None:
    options = settings["soup"]
    soup = cooked[options["recipe"]]
    by_short = {record.short: record for record in members}
    reported = kitchen.splits.reported()
    lineage = {
        "recipe": {key: options[key] for key in ("recipe", "metric", "ties")},
        "start": members[0].start,
        "split": members[0].split,
        "soup": hash_weights(soup.weights),
        "members": [
            {"fingerprint": by_short[short].fingerprint, "weights": by_short[short].weights} for short in soup.members
        ],
        "heldout": sign * soup.score,
        "model": settings["model"],
        "classes": list(kitchen.splits.classes),
        "versions": versions(),
        "pool": kitchen.pool.url,
    }
    report = Report(
        fingerprint=name,
        recipe=options["recipe"],
        metric=options["metric"],
        members=[by_short[short].fingerprint for short in soup.members],
        ingredients=[record.fingerprint for record in members],
        splits={"heldout": len(kitchen.splits.heldout), **{key: len(samples) for key, samples in reported.items()}},
        rows=rows,
        steps=[
            Decision(
                name=step.name,
                own_score=sign * step.own_score,
                soup_score=sign * step.soup_score,
                to_reach=None if math.isinf(step.to_reach) else sign * step.to_reach,
                kept=step.kept,
            )
            for step in cooked["greedy"].steps
        ],
        lineage=lineage,
        seconds=seconds,
    )
    with replacing_folder(folder) as scratch:
        write_safetensors(scratch / "soup.safetensors", soup.weights, {"lineage": json.dumps(lineage)})
        write_json(scratch / "config.json", settings)
        write_csv(report, scratch / "results.csv")
        draw_all(report, scratch)
        report.save(scratch)
