"""Any merge method over the ingredients, with the shared start as its base model and coefficients chosen by the held-out score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from soups.coefficients import search_parameters
from soups.errors import ConfigError
from soups.merging import make_method
from soups.recipes.recipe import Candidate, Score, Soup, ranked


def merge(
    candidates: Sequence[Candidate],
    score: Score,
    start: Candidate | None = None,
    method: str = "ties",
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> Soup:
    """Return the ingredients merged by a method of `soups.merging`.

    Every combination of candidate parameters is merged and scored once; the first of equally good ones is kept. Ingredients
    are merged in falling order of their own score, which matters to methods that favour the first (CABS), or that draw
    random masks.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        start: the base model of methods on task vectors.
        method: a name of `soups.merging.METHODS`.
        parameters: of the method; a list holds candidates to choose from, a list in a list one value an ingredient. What
            is left out has the method's default.

    Raises:
        ConfigError: no candidates, an unknown method or parameter, or a base model that is needed and not there.
        soups.errors.WeightsError: ingredients that do not fit each other or the start.
    """
    order = ranked(candidates)
    needs_base = make_method(method).base == "required"
    if needs_base and start is None:
        raise ConfigError(
            f"The method {method} works on task vectors: name the model that the checkpoints were fine-tuned from, "
            f"soup.start=/path/of/a/checkpoint."
        )
    with ExitStack() as stack:
        stores = [stack.enter_context(candidate.store()) for candidate in order]
        base = stack.enter_context(start.store()) if start is not None and needs_base else None
        found = search_parameters(method, stores, score, dict(parameters), base=base)
    trials = [{"parameters": trial.point, "score": trial.score} for trial in found.trials]
    return Soup(
        found.weights,
        [candidate.name for candidate in order],
        found.best.score,
        details={"method": method, "parameters": found.best.point, "trials": trials},
        note=f"{method} of {len(order)}" + "".join(f", {name} {value}" for name, value in found.best.point.items()),
    )
