"""Running recipes: each gets candidates, a held-out score, and whatever else its signature asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation import HeldoutGradient, diagonal_fisher
from soups.evaluation.scores import ranks
from soups.evaluation.statistics import losses
from soups.recipes import RECIPES, Candidate, Soup, Step, is_required, needs_of
from soups.recipes.racing import Race, hardest_first, in_order, network_samples, random_order
from soups.soup_making.evaluator import HELDOUT, SoupEvaluator
from soups.soup_making.ingredients import Reference
from soups.soup_making.models import LazyWeights
from soups.stores.pool import Ingredient

# Samples a backward pass each that the Fisher information is estimated on.
_FISHER_SAMPLES = 256
# Held-out samples of a race that are evaluated at once: fewer decide earlier, more compute faster.
_RACE_BLOCK = 64


@dataclass(frozen=True)
class Selection:
    """Soups that were chosen on the held-out split.

    Attributes:
        recipe: the one that was asked for.
        soups: by recipe; the uniform and the greedy one are among them.
        trials: per-sample held-out scores of the greedy search's trials in their order, (N,) each; empty if not known.
        evaluations: held-out scores that the recipe asked for.
        seconds: of the search, by phase.
    """

    recipe: str
    soups: dict[str, Soup]
    trials: list[Tensor] = field(default_factory=list[Tensor])
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def soup(self) -> Soup:
        """The soup that was asked for."""
        return self.soups[self.recipe]


def select(evaluator: SoupEvaluator, ingredients: Sequence[Ingredient], reference: Reference | None) -> Selection:
    """Make the soup that the options ask for, and the uniform and greedy ones, which every report shows.

    Args:
        evaluator: of the ingredients.
        ingredients: measured.
        reference: the model that the recipe interpolates from, if it does.

    Raises:
        ConfigError: the recipe needs a reference and there is none.
    """
    recipe, racing = evaluator.options.recipe, evaluator.options.racing
    candidates = evaluator.candidates(ingredients)
    trials: list[Tensor] = []

    def on_step(step: Step) -> None:
        trials.append(evaluator.latest_samples)

    began = time.perf_counter()
    # The options belong to the recipe that was asked for; what it asks again costs nothing.
    greedy = run_recipe(evaluator, "greedy", candidates, None, on_step)
    soups = {"uniform": run_recipe(evaluator, "uniform", candidates, None), "greedy": greedy}
    evaluations = {"uniform": 1, "greedy": len(candidates)}
    asked, since = evaluator.asked, time.perf_counter()
    if recipe not in soups:
        soups[recipe] = run_recipe(evaluator, recipe, candidates, reference)
        evaluations[recipe] = evaluator.asked - asked
    ended = time.perf_counter()
    alone = {"search of the recipe alone": ended - since} if len(soups) == 3 else {}
    known = [] if recipe == "greedy" and racing is not None else trials
    return Selection(recipe, soups, known, evaluations[recipe], {**alone, "search": ended - began})


def run_recipe(
    evaluator: SoupEvaluator,
    name: str,
    candidates: Sequence[Candidate],
    reference: Reference | None,
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Make the soup of one recipe, with the options if they are this recipe's and with its defaults otherwise.

    Args:
        evaluator: of the candidates.
        name: of the recipe.
        candidates: the ingredients.
        reference: the model that it interpolates from, if it does.
        on_step: told of each decision, if the recipe tells.

    Raises:
        ConfigError: the recipe needs a reference and there is none.
    """
    recipe, options = RECIPES[name], evaluator.options
    chosen = options.of_recipe if name == options.recipe else {}
    needs = needs_of(recipe)
    given: dict[str, Any] = {}
    if "start" in needs:
        if reference is None and is_required(recipe, "start"):
            raise ConfigError(
                f"The recipe {name} needs the model that fine-tuning started from, which nobody knows of checkpoints "
                f"made elsewhere: soup.start=/path/of/a/checkpoint."
            )
        if reference is not None:
            evaluator.keeps_statistics(reference.weights_hash)
        given["start"] = reference and Candidate(reference.name, float("nan"), reference.load)
    if "on_step" in needs:
        given["on_step"] = on_step
    if "labels" in needs:
        given["labels"] = evaluator.labels(HELDOUT)
    if "predict" in needs:
        given["predict"] = evaluator.heldout_logits
    if "gradient" in needs:
        given["gradient"] = HeldoutGradient(evaluator.network.module, evaluator.heldout_batches(), evaluator.device)
    if "fisher" in needs and chosen.get("form") == "fisher":
        given["fisher"] = lambda weights: diagonal_fisher(
            evaluator.network.module, weights, evaluator.heldout_batches(), evaluator.device, _FISHER_SAMPLES
        )
    racing = name == options.recipe == "greedy" and options.racing is not None
    soup = recipe(candidates, _race(evaluator, candidates) if racing else evaluator.score, **given, **chosen)
    path = [replace(point, load=lambda point=point: evaluator.repaired(point.load())) for point in soup.path]
    return replace(soup, weights=dict(evaluator.repaired(soup.weights)), path=path)


def _race(evaluator: SoupEvaluator, candidates: Sequence[Candidate]) -> Race:
    """Return the judge of a greedy search that stops early; exact where `racing` is 0."""
    delta = float(evaluator.options.racing or 0)
    labels = evaluator.labels(HELDOUT)
    if delta:
        order = random_order(len(labels), 0)
    else:
        by_name = {record.short: record for record in evaluator.pool.ingredients()}
        own = [
            evaluator.logits(LazyWeights(candidate.load), HELDOUT, by_name[candidate.name].weights)
            for candidate in candidates
        ]
        order = hardest_first(torch.stack([-losses(logits, labels) for logits in own]))
    world = ranks()[1]
    batches = in_order(evaluator.heldout_batches(), order, -(-_RACE_BLOCK // world))
    metric = cast(Literal["accuracy", "loss"], evaluator.metric)
    blocks = network_samples(evaluator.network.module, batches, metric, evaluator.device, world)
    best = 1.0 if metric == "accuracy" else 0.0
    return Race(lambda weights: blocks(evaluator.repaired(weights)), best, delta, len(candidates))
