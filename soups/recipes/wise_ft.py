"""WiSE-FT: the line from the model that fine-tuning started from to a fine-tuned one, or to a soup."""

from __future__ import annotations

from collections.abc import Sequence

from soups.recipes.greedy import greedy
from soups.recipes.recipe import Candidate, Score, Soup, check_choice, grid, line, ranked, walk
from soups.recipes.uniform import uniform

ENDS = ("best", "greedy", "uniform")


def wise_ft(
    candidates: Sequence[Candidate],
    score: Score,
    start: Candidate,
    end: str = "best",
    alpha: float | None = None,
    points: int = 11,
) -> Soup:
    """Return a point of the line (1 - α) · start + α · end (Robust fine-tuning, arXiv:2109.01903).

    The paper's line runs from the zero-shot model to the fine-tuned one and shows accuracy in distribution against
    accuracy under shift; the soup's `path` has every point of it, to be reported after selection. The paper recommends
    α = 0.5 where nothing is known of the shift. Without `alpha` the held-out score chooses (the smallest of equally good
    ones, since it is nearer to the start), which is an in-distribution choice.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; larger is better.
        start: the model that fine-tuning started from.
        end: "best" (single ingredient), "greedy" or "uniform" (their soups).
        alpha: share of the fine-tuned end, in [0, 1]; None to choose.
        points: on the grid, both ends included.

    Raises:
        ConfigError: no candidates, an unknown end, an α outside [0, 1], fewer than two points.
        soups.errors.WeightsError: the start and the ingredients do not fit each other.
    """
    check_choice("end", end, ENDS)
    positions = grid(points, alpha)
    best = ranked(candidates)[0]
    if end == "best":
        finish, shares, members = dict(best.load()), {best.name: 1.0}, [best.name]
    else:
        soup = greedy(candidates, score) if end == "greedy" else uniform(candidates, score)
        finish, shares, members = soup.weights, soup.coefficients, soup.members
    origin = start.load()
    best_point, path = walk(
        lambda position: line(origin, finish, position, where=end), score, positions, prefer=lambda position: -position
    )
    chosen = best_point if alpha is None else next(point for point in path if point.position == alpha)
    at = chosen.position
    coefficients = {"start": 1 - at} | {name: at * share for name, share in shares.items()}
    return Soup(
        dict(chosen.load()),
        members,
        chosen.score,
        coefficients=coefficients,
        path=path,
        path_label="α: share of the fine-tuned end",
        details={"alpha": at, "end": end},
    )
