"""The loss around a soup, after selection has ended: paths, barriers, and a landscape, on the held-out split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from soups.errors import ConfigError
from soups.evaluation import distances, score
from soups.evaluation.barrier import Load, Numbers, along, barriers, one_by_one
from soups.evaluation.cautions import different_basins
from soups.evaluation.landscape import Plane, landscape, plane
from soups.recipes import Candidate, Soup
from soups.recipes.recipe import ranked
from soups.reporting.page import Part
from soups.reporting.shape import barrier_matrix, landscape_parts, path_curves
from soups.soup_making.evaluator import HELDOUT, SoupEvaluator
from soups.soup_making.ingredients import Reference
from soups.stores import DictStore
from soups.stores.pool import Ingredient
from soups.weights import Weights

# Pairs grow with the square: barriers are of the best ingredients alone.
_MOST = 10
START, SOUP = "the start", "the soup"


@dataclass
class Surroundings:
    """Parts of the report's page, and warnings."""

    parts: list[Part] = field(default_factory=list[Part])
    warnings: list[str] = field(default_factory=list[str])


def surroundings(
    evaluator: SoupEvaluator,
    ingredients: Sequence[Ingredient],
    soup: Soup,
    references: Sequence[Reference],
    on_evaluation: Callable[[], None] = lambda: None,
) -> Surroundings:
    """Return the parts that `soup.barrier` and `soup.landscape` ask for, and what they warn of.

    Every rank calls it: predictions are shared out. BatchNorm statistics are treated as in soups (`soup.batchnorm`): on the
    line with the weights, or measured at every point.

    Args:
        evaluator: of the soup.
        ingredients: measured.
        soup: the one that was asked for.
        references: models that fine-tuning started from, the nearest last; may be empty.
        on_evaluation: called after each evaluation, for progress.
    """
    options = evaluator.options
    candidates = ranked(evaluator.candidates(ingredients))
    found = Surroundings()

    def numbers(weights: Weights) -> Numbers:
        measured = score(evaluator.heldout_logits(weights), evaluator.labels(HELDOUT))
        on_evaluation()
        return {"loss": measured.loss, "error": 1 - measured.accuracy}

    start: dict[str, Load] = {START: references[-1].load} if references else {}
    if options.barrier:
        route = start | {candidates[0].name: candidates[0].load, SOUP: lambda: soup.weights}
        path = along(list(route.values()), one_by_one(numbers))
        for number in ("error", "loss"):
            found.parts.append(path_curves(path, list(route), number, f"From the start to the soup: {number}"))
        loads = {candidate.name: candidate.load for candidate in candidates[:_MOST]}
        if len(loads) > 1:
            heights = barriers(loads, one_by_one(numbers))["error"]
            found.parts.append(barrier_matrix(heights, list(loads), "error"))
            if caution := different_basins({pair: barrier.height for pair, barrier in heights.items()}):
                found.warnings.append(caution.message)
    if options.landscape:
        models = start | {candidate.name: candidate.load for candidate in candidates} | {SOUP: lambda: soup.weights}
        try:
            through = _plane(candidates, soup, references)
        except ConfigError as error:
            found.warnings.append(f"The landscape was left out. {error}")
            return found
        xs, ys = through.grid(options.grid)
        surface = landscape(list(models.values()), through, one_by_one(numbers), xs, ys)
        found.parts += landscape_parts(surface, list(models), "loss")
    return found


def _plane(candidates: Sequence[Candidate], soup: Soup, references: Sequence[Reference]) -> Plane:
    """Return the plane through the start and the two best ingredients, or the three best where no start is known."""
    if len(candidates) + bool(references) < 3:
        raise ConfigError("It needs the start and two ingredients, or three ingredients.")
    with ExitStack() as stack:
        first = [DictStore(references[-1].load(), START)] if references else []
        stores = [stack.enter_context(candidate.store()) for candidate in candidates]
        return plane(distances([*first, *stores, DictStore(soup.weights, SOUP)]))
