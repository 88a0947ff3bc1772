"""After selection has ended: the predictions of every model on every split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.progress import Progress
from torch import Tensor

from soups.evaluation import ensemble
from soups.soup_making.evaluator import HELDOUT, SoupEvaluator
from soups.soup_making.ingredients import Reference
from soups.soup_making.models import LazyWeights
from soups.soup_making.selection import Selection
from soups.stores.pool import Ingredient
from soups.weights import Weights, hash_weights

# Logits (N, classes) by split.
BySplit = dict[str, Tensor]


@dataclass(frozen=True)
class Predictions:
    """What the models of a finished selection predict.

    Attributes:
        evaluator: of the soup.
        ingredients: measured.
        selection: the soups.
        references: the linear probe and the base model, where they are known.
        splits: names, the held-out one first.
        of_ingredients: by short name.
        of_references: by name.
        of_soups: by recipe.
        on_path: of the points on the path of the soup that was asked for.
    """

    evaluator: SoupEvaluator
    ingredients: Sequence[Ingredient]
    selection: Selection
    references: Sequence[Reference]
    splits: Sequence[str]
    of_ingredients: dict[str, BySplit]
    of_references: dict[str, BySplit]
    of_soups: dict[str, BySplit]
    on_path: list[BySplit]

    @property
    def best(self) -> Ingredient:
        """The best ingredient by its own held-out score."""
        return self.evaluator.best_first(self.ingredients)[0]

    def ensemble(self) -> BySplit:
        """Return the logit ensemble of the ingredients."""
        return {
            split: ensemble([self.of_ingredients[record.short][split] for record in self.ingredients])
            for split in self.splits
        }


@dataclass(frozen=True)
class _Model:
    weights_hash: str
    load: Callable[[], Weights]
    found: BySplit


def predict_all(
    evaluator: SoupEvaluator,
    ingredients: Sequence[Ingredient],
    selection: Selection,
    references: Sequence[Reference],
    display: Progress,
) -> Predictions:
    """Run every model on every split, each split once in memory; predictions that the pool has are read.

    Args:
        evaluator: of the soup.
        ingredients: measured.
        selection: the soups.
        references: models to show first.
        display: for progress.
    """
    found = Predictions(
        evaluator,
        ingredients,
        selection,
        references,
        [HELDOUT, *evaluator.run.splits.reported()],
        {record.short: {} for record in ingredients},
        {one.name: {} for one in references},
        {name: {} for name in selection.soups},
        [{} for _ in selection.soup.path],
    )
    models = [
        *(_Model(one.weights_hash, one.load, found.of_references[one.name]) for one in references),
        *(
            _Model(
                record.weights,
                lambda name=record.fingerprint: evaluator.models.weights(name),
                found.of_ingredients[record.short],
            )
            for record in ingredients
        ),
        *(
            _Model(hash_weights(soup.weights), lambda soup=soup: soup.weights, found.of_soups[name])
            for name, soup in selection.soups.items()
        ),
        *(
            _Model(hash_weights(point.load()), point.load, values)
            for point, values in zip(selection.soup.path, found.on_path, strict=True)
        ),
    ]
    bar = display.add_task("Evaluating on all splits", total=len(models) * len(found.splits))
    for split in found.splits:
        for model in models:
            model.found[split] = evaluator.logits(LazyWeights(model.load), split, model.weights_hash)
            display.advance(bar)
    return found
