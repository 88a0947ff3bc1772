"""The shape of the loss around a soup, after selection has ended: paths, barriers, and a landscape, on the held-out split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from soups.errors import ConfigError
from soups.evaluation import distances, score
from soups.evaluation.barrier import Load, Numbers, along, barriers, one_by_one
from soups.evaluation.cautions import different_basins
from soups.evaluation.landscape import Plane, landscape, plane
from soups.launch.kitchen import Kitchen
from soups.launch.members import Origin
from soups.recipes import Candidate, Soup
from soups.recipes.recipe import ranked
from soups.reporting.page import Part
from soups.reporting.shape import barrier_matrix, landscape_parts, path_curves
from soups.stores import DictStore
from soups.stores.pool import Ingredient
from soups.weights import Weights

# Pairs grow with the square: barriers are of the best ingredients alone.
_MOST = 10
START, SOUP = "the start", "the soup"


def shapes(
    kitchen: Kitchen,
    members: Sequence[Ingredient],
    soup: Soup,
    starts: Sequence[Origin],
    tell: Callable[[], None] = lambda: None,
) -> tuple[list[Part], list[str]]:
    """Return the parts that `soup.barrier` and `soup.landscape` ask for, and what they warn of.

    Every rank calls it: predictions are shared out. BatchNorm statistics are what `soup.batchnorm` says, as in soups:
    on the line with the weights, or measured at every point.

    Args:
        kitchen: with its pool.
        members: the ingredients, measured.
        soup: the one that was asked for.
        starts: what fine-tuning started from, the nearest last; may be empty.
        tell: called after each evaluation, for progress.
    """
    options = kitchen.settings["soup"]
    candidates = ranked(kitchen.candidates(members))
    parts: list[Part] = []
    warnings: list[str] = []

    def numbers(weights: Weights) -> Numbers:
        found = score(kitchen.heldout_logits(weights), kitchen.labels("heldout"))
        tell()
        return {"loss": found.loss, "error": 1 - found.accuracy}

    if options.get("barrier"):
        route: dict[str, Load] = {START: starts[-1].load} if starts else {}
        route |= {candidates[0].name: candidates[0].load, SOUP: lambda: soup.weights}
        path = along(list(route.values()), one_by_one(numbers))
        for number in ("error", "loss"):
            parts.append(path_curves(path, list(route), number, f"From the start to the soup: {number}"))
        loads = {candidate.name: candidate.load for candidate in candidates[:_MOST]}
        if len(loads) > 1:
            found = barriers(loads, one_by_one(numbers))["error"]
            parts.append(barrier_matrix(found, list(loads), "error"))
            if caution := different_basins({pair: barrier.height for pair, barrier in found.items()}):
                warnings.append(caution.message)
    if options.get("landscape"):
        models: dict[str, Load] = {START: starts[-1].load} if starts else {}
        models |= {candidate.name: candidate.load for candidate in candidates} | {SOUP: lambda: soup.weights}
        try:
            through = _plane(candidates, soup, starts)
        except ConfigError as error:
            return parts, [*warnings, f"The landscape was left out. {error}"]
        xs, ys = through.grid(int(options["grid"]))
        surface = landscape(list(models.values()), through, one_by_one(numbers), xs, ys)
        parts += landscape_parts(surface, list(models), "loss")
    return parts, warnings


def _plane(candidates: Sequence[Candidate], soup: Soup, starts: Sequence[Origin]) -> Plane:
    """Return the plane through the start and the two best ingredients, or the three best where no start is known."""
    if len(candidates) + bool(starts) < 3:
        raise ConfigError("It needs the start and two ingredients, or three ingredients.")
    with ExitStack() as stack:
        first = [DictStore(starts[-1].load(), START)] if starts else []
        stores = [stack.enter_context(candidate.store()) for candidate in candidates]
        return plane(distances([*first, *stores, DictStore(soup.weights, SOUP)]))
