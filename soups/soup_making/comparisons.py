"""How far the numbers of the final table can be trusted: paired tests, the cost of choosing, diversity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soups.evaluation import diversity as measure_diversity
from soups.evaluation.statistics import best_single, compare_accuracy, mean_over_splits, right, selection_effect
from soups.recipes import Candidate, Soup, greedy
from soups.recipes.replay import only_tried, replay
from soups.reporting.soup_report import Difference, Optimism, soup_name
from soups.soup_making.evaluator import HELDOUT
from soups.soup_making.predictions import Predictions
from soups.weights import Weights

# Of the selection effect; its estimate is no surer with more, since all rounds share one set of samples.
_ROUNDS = 100
# Below this many held-out samples a choice made again on half of them says nothing.
_FEWEST = 20


def differences(found: Predictions) -> list[Difference]:
    """Compare soups with the best single model on the same samples of the test split, and of the OOD splits together."""
    evaluator, recipe = found.evaluator, found.selection.recipe
    splits = evaluator.run.splits
    shifted = list(splits.ood)
    # Corrupted copies of the test images are not independent of each other: they form one group.
    copies = [split for split in shifted if getattr(splits.ood[split], "source", None) is splits.test]
    best = found.of_ingredients[found.best.short]
    compared: list[Difference] = []
    for name in dict.fromkeys([recipe, "greedy", "uniform"]):
        pairs = {
            split: (
                right(found.of_soups[name][split], evaluator.labels(split)),
                right(best[split], evaluator.labels(split)),
            )
            for split in ("test", *shifted)
        }
        test = compare_accuracy(*pairs["test"])
        compared.append(
            Difference(
                name=soup_name(name),
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
            compared.append(
                Difference(
                    name=soup_name(name),
                    against="best single",
                    split="OOD",
                    value=ood.value,
                    low=ood.low,
                    high=ood.high,
                )
            )
    return compared


def optimism(found: Predictions) -> list[Optimism]:
    """Estimate what choosing on the held-out split did to the held-out scores of the choices."""
    evaluator, ingredients = found.evaluator, found.ingredients
    count = len(evaluator.labels(HELDOUT))
    if count < _FEWEST or len(ingredients) < 2:
        return []
    order = sorted(ingredients, key=lambda record: record.short)
    own = torch.stack([evaluator.samples(found.of_ingredients[record.short][HELDOUT], HELDOUT) for record in order])
    effects = {"best single": (selection_effect(best_single(own), count, rounds=_ROUNDS), "")}
    steps, trials = found.selection.soups["greedy"].steps, found.selection.trials
    if len(trials) == len(steps):
        known: dict[frozenset[str], Tensor] = {}
        kept: list[str] = []
        for step, samples in zip(steps, trials, strict=True):
            known[frozenset([*kept, step.name])] = samples
            kept += [step.name] if step.kept else []

        def again(candidates: Sequence[Candidate], ask: Callable[[Weights], float]) -> Soup:
            return greedy(candidates, ask)

        chosen_again = replay(again, [record.short for record in order], own, only_tried(known))
        effect = selection_effect(chosen_again, count, rounds=_ROUNDS)
        effects["greedy soup"] = effect, "a lower bound: soups that the search did not try are barred"
    return [
        Optimism(
            name=name, value=effect.optimism.value, low=effect.optimism.low, high=effect.optimism.high,
            samples=effect.samples, note=note,
        )
        for name, (effect, note) in effects.items()
    ]  # fmt: skip


def diversity(found: Predictions) -> dict[str, dict[str, float | None]]:
    """Measure how differently the ingredients err on each split; infinite and undefined values become None."""
    if len(found.ingredients) < 2:
        return {}
    measures: dict[str, dict[str, float | None]] = {}
    for split in found.splits:
        logits = [found.of_ingredients[record.short][split] for record in found.ingredients]
        measured = measure_diversity(logits, found.evaluator.labels(split))
        values = {
            "disagreement": measured.disagreement,
            "ratio of errors": measured.ratio_error,
            "Q statistic": measured.q_statistic,
        }
        measures[split] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return measures
