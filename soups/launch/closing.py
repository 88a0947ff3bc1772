"""After selection has ended: every model on every split, with intervals, paired tests and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from soups.evaluation import diversity, ensemble, score
from soups.evaluation.barrier import barrier
from soups.evaluation.cautions import (
    Caution,
    averaged_statistics,
    different_basins,
    different_heads,
    equal_weights,
    noisy_choice,
    one_kept,
    running_statistics,
    small_split,
    statistics_gaps,
    unshared_tensors,
)
from soups.evaluation.statistics import (
    best_single,
    compare_accuracy,
    mean_over_splits,
    right,
    selection_effect,
    wilson,
)
from soups.launch.kitchen import AVERAGE, Kitchen, LazyWeights
from soups.launch.members import Origin
from soups.recipes import Candidate, Soup, greedy
from soups.recipes.recipe import line
from soups.recipes.replay import only_tried, replay
from soups.reporting.report import Difference, Optimism, PathPoint, Row, soup_name
from soups.stores.pool import Ingredient
from soups.weights import Weights, hash_weights

# Recipes that look at each ingredient and may reject it.
_CHOOSING = ("greedy", "greedy_removal", "greedy_weights", "diwa")
# Of the selection effect; its estimate is no surer with more, since all rounds share one set of samples.
_ROUNDS = 100
# Below this many held-out samples a choice made again on half of them says nothing.
_FEWEST = 20


@dataclass(frozen=True)
class Closing:
    """What was measured after selection; see `Report`."""

    rows: list[Row]
    path: list[PathPoint]
    differences: list[Difference]
    optimism: list[Optimism]
    diversity: dict[str, dict[str, float | None]]
    warnings: list[str]


@dataclass(frozen=True)
class _Model:
    name: str
    kind: str
    weights: str
    load: Callable[[], Weights]


def close(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    recipe: str,
    starts: Sequence[Origin],
    tried: Sequence[Tensor],
    display: Progress,
) -> Closing:
    """Evaluate everything on every split.

    Args:
        kitchen: with its pool.
        members: the ingredients, measured.
        cooked: the soups by recipe, the greedy and the uniform one among them.
        recipe: the one that was asked for.
        starts: models to show first.
        tried: per-sample held-out scores of the greedy search's trials in their order, (N,) each; empty if not known.
        display: for progress.
    """
    splits = ["heldout", *kitchen.splits.reported()]
    models = [
        *(_Model(start.name, "start", start.weights, start.load) for start in starts),
        *(
            _Model(
                record.short, "ingredient", record.weights, lambda name=record.fingerprint: kitchen.pool.weights(name)
            )
            for record in members
        ),
        *(
            _Model(soup_name(name), "soup", hash_weights(soup.weights), lambda soup=soup: soup.weights)
            for name, soup in cooked.items()
        ),
    ]
    path = cooked[recipe].path
    points = [_Model(str(point.position), "point", hash_weights(point.load()), point.load) for point in path]
    bar = display.add_task("Evaluating on all splits", total=(len(models) + len(points)) * len(splits))
    logits: dict[str, dict[str, Tensor]] = {model.name: {} for model in models}
    on_path: list[dict[str, Tensor]] = [{} for _ in points]
    for split in splits:
        for model, found in [*((m, logits[m.name]) for m in models), *zip(points, on_path, strict=True)]:
            found[split] = kitchen.logits(LazyWeights(model.load), split, model.weights)
            display.advance(bar)
    rows = _rows(kitchen, members, cooked, recipe, models, logits, splits)
    best = next(row.note for row in rows if row.kind == "best")
    return Closing(
        rows,
        [
            PathPoint(
                position=point.position,
                accuracy=_by_split(kitchen, values, "accuracy"),
                loss=_by_split(kitchen, values, "loss"),
            )
            for point, values in zip(path, on_path, strict=True)
        ],
        _differences(kitchen, logits, recipe, best, splits),
        _optimism(kitchen, members, logits, cooked, recipe, tried),
        _diversity(kitchen, members, logits, splits),
        _warnings(kitchen, members, cooked, recipe, logits),
    )


def _numbers(kitchen: Kitchen, values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return accuracy and loss by split."""
    numbers = {split: score(value, kitchen.labels(split)) for split, value in values.items()}
    return {split: {"accuracy": number.accuracy, "loss": number.loss} for split, number in numbers.items()}


def _by_split(kitchen: Kitchen, values: Mapping[str, Tensor], metric: str) -> dict[str, float]:
    return {split: numbers[metric] for split, numbers in _numbers(kitchen, values).items()}


def _row(kitchen: Kitchen, name: str, kind: str, values: Mapping[str, Tensor], note: str = "") -> Row:
    intervals = {}
    for split, value in values.items():
        labels = kitchen.labels(split)
        interval = wilson(int(right(value, labels).sum()), len(labels))
        intervals[split] = (interval.low, interval.high)
    return Row(name=name, kind=kind, note=note, interval=intervals, metrics=_numbers(kitchen, values))


def _rows(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    recipe: str,
    models: Sequence[_Model],
    logits: Mapping[str, Mapping[str, Tensor]],
    splits: Sequence[str],
) -> list[Row]:
    notes = _notes(cooked, recipe, kitchen.metric)
    order = sorted(members, key=lambda record: -kitchen.sign * record.heldout(kitchen.metric))
    single = [
        _row(kitchen, record.short, "ingredient", logits[record.short], notes.get(record.short, "left out"))
        for record in order
    ]
    average = Row(
        name="mean of ingredients",
        kind="mean",
        metrics={
            split: {
                "accuracy": _average([line.accuracy[split] for line in single]),
                "loss": _average([line.loss[split] for line in single]),
            }
            for split in splits
        },
    )
    best = single[0].model_copy(update={"name": "best single", "kind": "best", "note": single[0].name})
    together = {split: ensemble([logits[record.short][split] for record in members]) for split in splits}
    return [
        *(_row(kitchen, model.name, "start", logits[model.name]) for model in models if model.kind == "start"),
        *single,
        average,
        best,
        *(
            _row(
                kitchen, soup_name(name), "soup", logits[soup_name(name)], soup.note or f"{len(soup.members)} averaged"
            )
            for name, soup in cooked.items()
        ),
        _row(kitchen, "logit ensemble", "ensemble", together, f"{len(members)} models at inference"),
    ]


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _notes(cooked: Mapping[str, Soup], recipe: str, metric: str) -> dict[str, str]:
    """Say of each ingredient what became of it: in the greedy search, or its share in another recipe's soup."""
    soup = cooked[recipe]
    if recipe not in ("greedy", "uniform") and not (recipe == "diwa" and soup.steps):
        if not soup.coefficients:
            return dict.fromkeys(soup.members, "merged")
        return {name: f"share {value:.3f}" for name, value in soup.coefficients.items()}
    notes: dict[str, str] = {}
    for number, step in enumerate(cooked["greedy"].steps):
        if step.kept:
            notes[step.name] = "kept: the best" if number == 0 else "kept"
        elif step.evaluated < 1:
            notes[step.name] = f"left out after {step.evaluated:.0%} of the held-out split"
        elif metric == "accuracy":
            notes[step.name] = f"left out: soup {100 * step.soup_score:.2f} < {100 * step.to_reach:.2f}"
        else:
            notes[step.name] = f"left out: soup loss {-step.soup_score:.4f} > {-step.to_reach:.4f}"
    return notes


def _differences(
    kitchen: Kitchen, logits: Mapping[str, Mapping[str, Tensor]], recipe: str, best: str, splits: Sequence[str]
) -> list[Difference]:
    """Compare soups with the best single model on the same samples."""
    found: list[Difference] = []
    shifted = [split for split in splits if split not in ("heldout", "test")]
    reported = kitchen.splits.reported()
    # Corrupted copies of the test images are not independent of each other: they form one group.
    copies = [split for split in shifted if getattr(reported[split], "source", None) is kitchen.splits.test]
    for name in dict.fromkeys([soup_name(recipe), soup_name("greedy"), soup_name("uniform")]):
        pairs = {
            split: (
                right(logits[name][split], kitchen.labels(split)),
                right(logits[best][split], kitchen.labels(split)),
            )
            for split in splits
        }
        test = compare_accuracy(*pairs["test"])
        found.append(
            Difference(
                name=name,
                against="best single",
                split="test",
                value=test.difference.value,
                low=test.difference.low,
                high=test.difference.high,
                p_value=test.p_value,
                test=test.test,
            )
        )
        change = {split: pairs[split][0].double() - pairs[split][1].double() for split in shifted}
        groups = [change[split] for split in shifted if split not in copies]
        groups += [torch.stack([change[split] for split in copies])] if copies else []
        if groups and min(group.shape[-1] for group in groups) >= 2:
            ood = mean_over_splits(groups)
            found.append(
                Difference(name=name, against="best single", split="OOD", value=ood.value, low=ood.low, high=ood.high)
            )
    return found


def _optimism(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    logits: Mapping[str, Mapping[str, Tensor]],
    cooked: Mapping[str, Soup],
    recipe: str,
    tried: Sequence[Tensor],
) -> list[Optimism]:
    """Estimate what choosing on the held-out split did to the held-out scores of the choices."""
    count = len(kitchen.labels("heldout"))
    if count < _FEWEST or len(members) < 2:
        return []
    order = sorted(members, key=lambda record: record.short)
    own = torch.stack([kitchen.samples(logits[record.short]["heldout"], "heldout") for record in order])
    effects = {"best single": (selection_effect(best_single(own), count, rounds=_ROUNDS), "")}
    steps = cooked["greedy"].steps
    if len(tried) == len(steps):
        known: dict[frozenset[str], Tensor] = {}
        kept: list[str] = []
        for step, samples in zip(steps, tried, strict=True):
            known[frozenset([*kept, step.name])] = samples
            kept += [step.name] if step.kept else []

        def again(candidates: Sequence[Candidate], ask: Callable[[Weights], float]) -> Soup:
            return greedy(candidates, ask)

        select = replay(again, [record.short for record in order], own, only_tried(known))
        effect = selection_effect(select, count, rounds=_ROUNDS)
        effects["greedy soup"] = effect, "a lower bound: soups that the search did not try are barred"
    return [
        Optimism(
            name=name, value=effect.optimism.value, low=effect.optimism.low, high=effect.optimism.high,
            samples=effect.samples, note=note,
        )
        for name, (effect, note) in effects.items()
    ]  # fmt: skip


def _diversity(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    logits: Mapping[str, Mapping[str, Tensor]],
    splits: Sequence[str],
) -> dict[str, dict[str, float | None]]:
    """Measure how differently the ingredients err on each split; infinite and undefined values become None."""
    if len(members) < 2:
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for split in splits:
        measured = diversity([logits[record.short][split] for record in members], kitchen.labels(split))
        values: dict[str, Any] = {
            "disagreement": measured.disagreement,
            "ratio of errors": measured.ratio_error,
            "Q statistic": measured.q_statistic,
        }
        found[split] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return found


def _warnings(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    cooked: Mapping[str, Soup],
    recipe: str,
    logits: Mapping[str, Mapping[str, Tensor]],
) -> list[str]:
    """Return what a careful reader must know; see `soups.evaluation.cautions`."""
    labels = kitchen.labels("heldout")
    order = sorted(members, key=lambda record: -kitchen.sign * record.heldout(kitchen.metric))
    correct = [right(logits[record.short]["heldout"], labels) for record in order]
    found: list[Caution | None] = [
        small_split(int(correct[0].sum()), len(labels)),
        equal_weights({record.short: record.weights for record in members}),
    ]
    if len(members) > 1:
        if len(labels) > 1:
            found.append(
                noisy_choice(torch.stack([kitchen.samples(logits[r.short]["heldout"], "heldout") for r in order]))
            )
        if recipe in _CHOOSING:
            found.append(one_kept(len(cooked[recipe].members), len(members)))
        found.append(_statistics(kitchen, order, cooked["uniform"].weights, logits[soup_name("uniform")]["heldout"]))
        first, second = (kitchen.pool.weights(record.fingerprint) for record in order[:2])
        middle = right(kitchen.heldout_logits(line(first, second, 0.5, where=order[1].short)), labels)
        errors = [1 - float(values.double().mean()) for values in (correct[0], middle, correct[1])]
        found.append(different_basins({(order[0].short, order[1].short): barrier([0, 0.5, 1], errors).height}))
        found.append(
            different_heads(
                {
                    record.short: unshared_tensors(first, kitchen.pool.weights(record.fingerprint))
                    for record in order[1:]
                }
            )
        )
    return [caution.message for caution in found if caution is not None]


def _statistics(kitchen: Kitchen, members: Sequence[Ingredient], uniform: Weights, logits: Tensor) -> Caution | None:
    """Caution when BatchNorm statistics that differ were averaged, with what that did to the uniform soup.

    Args:
        kitchen: with its pool.
        members: two ingredients at least.
        uniform: weights of the uniform soup.
        logits: its held-out ones.
    """
    if kitchen.settings["soup"].get("batchnorm", AVERAGE) != AVERAGE:
        return None
    names = running_statistics(uniform)
    read: list[Weights] = []
    for record in members if names else ():
        with kitchen.pool.store(record.fingerprint) as store:
            read.append({name: store.read(name) for name in names})
    gaps = {record.short: statistics_gaps(read[0], own) for record, own in zip(members, read, strict=False)}
    if averaged_statistics(gaps) is None:
        return None
    measured = kitchen.logits(kitchen.reestimated(uniform, hash_weights(uniform)), "heldout")
    labels = kitchen.labels("heldout")
    return averaged_statistics(gaps, (score(logits, labels).accuracy, score(measured, labels).accuracy))
