"""DiWA: average many independent runs from one start, all of them or the ones a greedy pass keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from soups.recipes.greedy import greedy
from soups.recipes.recipe import Candidate, Score, Soup, Step, check_choice
from soups.recipes.uniform import uniform

SELECTIONS = ("uniform", "restricted")


def diwa(
    candidates: Sequence[Candidate],
    score: Score,
    selection: str = "restricted",
    on_step: Callable[[Step], None] | None = None,
) -> Soup:
    """Return the diverse weight average (arXiv:2205.09739).

    As a selection it is the uniform soup, or ("restricted") the greedy soup that keeps at equal scores. What makes it
    DiWA is around it: runs from one linear probe that differ in mild hyper-parameters, data of several domains with one
    left out (`data=image_domains`), and `score` on held-out images of the training domains only. How far the members
    agree is what the paper explains the gain by; `soups.evaluation.diversity` measures it, and every report shows it.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        selection: "uniform" or "restricted".
        on_step: called after each decision, for progress.

    Raises:
        ConfigError: no candidates, or an unknown selection.
        soups.errors.WeightsError: ingredients that do not fit each other.
    """
    check_choice("selection", selection, SELECTIONS)
    soup = uniform(candidates, score) if selection == "uniform" else greedy(candidates, score, "paper", on_step)
    return replace(soup, details={"selection": selection})
