"""What a careful reader of the report must know; see `soups.evaluation.cautions`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soups.evaluation import score
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
from soups.evaluation.statistics import right
from soups.recipes.recipe import line
from soups.soup_making.evaluator import HELDOUT, SoupEvaluator
from soups.soup_making.options import AVERAGE
from soups.soup_making.predictions import Predictions
from soups.stores.pool import Ingredient
from soups.weights import Weights, hash_weights

# Recipes that look at each ingredient and may reject it.
_CHOOSING = ("greedy", "greedy_removal", "greedy_weights", "diwa")


def warnings(found: Predictions) -> list[str]:
    """Return the warnings that apply, as sentences."""
    evaluator, selection = found.evaluator, found.selection
    labels = evaluator.labels(HELDOUT)
    order = evaluator.best_first(found.ingredients)
    logits = [found.of_ingredients[record.short][HELDOUT] for record in order]
    cautions: list[Caution | None] = [
        small_split(int(right(logits[0], labels).sum()), len(labels)),
        equal_weights({record.short: record.weights for record in found.ingredients}),
    ]
    if len(order) > 1:
        if len(labels) > 1:
            cautions.append(noisy_choice(torch.stack([evaluator.samples(one, HELDOUT) for one in logits])))
        if selection.recipe in _CHOOSING:
            cautions.append(one_kept(len(selection.soup.members), len(order)))
        uniform = selection.soups["uniform"].weights
        cautions.append(_statistics(evaluator, order, uniform, found.of_soups["uniform"][HELDOUT]))
        cautions.append(_basins(evaluator, order, logits))
        first = evaluator.models.weights(order[0].fingerprint)
        cautions.append(
            different_heads(
                {
                    record.short: unshared_tensors(first, evaluator.models.weights(record.fingerprint))
                    for record in order[1:]
                }
            )
        )
    return [caution.message for caution in cautions if caution is not None]


def _basins(evaluator: SoupEvaluator, order: Sequence[Ingredient], logits: Sequence[Tensor]) -> Caution | None:
    """Caution when the middle between the two best ingredients is worse than both."""
    labels = evaluator.labels(HELDOUT)
    first, second = (evaluator.models.weights(record.fingerprint) for record in order[:2])
    middle = evaluator.heldout_logits(line(first, second, 0.5, where=order[1].short))
    errors = [1 - float(right(one, labels).double().mean()) for one in (logits[0], middle, logits[1])]
    return different_basins({(order[0].short, order[1].short): barrier([0, 0.5, 1], errors).height})


def _statistics(
    evaluator: SoupEvaluator, ingredients: Sequence[Ingredient], uniform: Weights, logits: Tensor
) -> Caution | None:
    """Caution when BatchNorm statistics that differ were averaged, and say what that did to the uniform soup.

    Args:
        evaluator: of the soup.
        ingredients: two at least.
        uniform: weights of the uniform soup.
        logits: its held-out ones.
    """
    if evaluator.options.batchnorm != AVERAGE:
        return None
    names = running_statistics(uniform)
    read: list[Weights] = []
    for record in ingredients if names else ():
        with evaluator.pool.store(record.fingerprint) as store:
            read.append({name: store.read(name) for name in names})
    gaps = {record.short: statistics_gaps(read[0], own) for record, own in zip(ingredients, read, strict=False)}
    if averaged_statistics(gaps) is None:
        return None
    measured = evaluator.batchnorm.reestimated(uniform, hash_weights(uniform))
    labels = evaluator.labels(HELDOUT)
    return averaged_statistics(
        gaps, (score(logits, labels).accuracy, score(evaluator.logits(measured, HELDOUT), labels).accuracy)
    )
