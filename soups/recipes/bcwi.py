"""BCWI: update a model without breaking what the old one had right, by interpolating back towards it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation.flips import negative_flip_rate
from soups.recipes.recipe import (
    Candidate,
    Fisher,
    Predict,
    Score,
    Soup,
    check_choice,
    grid,
    line,
    ranked,
    walk,
)
from soups.recipes.uniform import uniform
from soups.reduction import accumulation_dtype
from soups.weights import Weights, check_same, is_averaged, tied_names

FORMS = ("plain", "soup", "fisher")


def bcwi(
    candidates: Sequence[Candidate],
    score: Score,
    start: Candidate,
    predict: Predict,
    labels: Tensor,
    fisher: Fisher | None = None,
    form: str = "plain",
    alpha: float | None = None,
    points: int = 11,
    tolerance: float = 0.0,
) -> Soup:
    """Return α · old + (1 - α) · new (backward-compatible weight interpolation, arXiv:2301.10546).

    The old model is the one that the new ones were fine-tuned from. A negative flip is a sample that the old model has
    right and the new one wrong. α = 0 is the new model, α = 1 the old one; the soup's `path` has the points between, and
    `details["negative_flips"]` the rate at each. Without `alpha`, the one with the fewest held-out negative flips is
    chosen among those that score at most `tolerance` below the new model (the smallest of equally good ones).

    Args:
        candidates: the new models.
        score: held-out score of some weights; larger is better.
        start: the old model.
        predict: held-out logits of some weights.
        labels: of the held-out split, int64 (N,).
        fisher: the diagonal Fisher information; needed for that form.
        form: "plain" takes the best single new model, "soup" the average of all, "fisher" the best single one with the
            old weights weighed by their Fisher information, scaled to mean 1 over the model.
        alpha: share of the old model, in [0, 1]; None to choose.
        points: on the grid, both ends included.
        tolerance: in units of `score`.

    Raises:
        ConfigError: no candidates, an unknown form, an α outside [0, 1], no `fisher` for that form.
        soups.errors.WeightsError: old and new do not fit each other.
    """
    check_choice("form", form, FORMS)
    positions = grid(points, alpha)
    best = ranked(candidates)[0]
    old = start.load()
    if form == "soup":
        soup = uniform(candidates, score)
        new, shares, members = soup.weights, soup.coefficients, soup.members
    else:
        new, shares, members = dict(best.load()), {best.name: 1.0}, [best.name]
    importance: dict[str, Tensor] | None = None
    if form == "fisher":
        if fisher is None:
            raise ConfigError("The Fisher form needs `fisher`, a function that returns the Fisher information.")
        importance = _mean_one(fisher(old))

    def between(share: float) -> dict[str, Tensor]:
        if importance is None:
            return line(new, old, share, where=start.name)
        return fisher_line(new, old, share, importance, where=start.name)

    before = predict(old)
    flips: list[float] = []

    def scored(made: Weights) -> float:
        flips.append(negative_flip_rate(before, predict(made), labels))
        return score(made)

    _, path = walk(between, scored, positions, prefer=lambda position: -position)
    if alpha is None:
        enough = path[0].score - tolerance
        fine = [number for number, point in enumerate(path) if point.score >= enough]
        chosen = min(fine, key=lambda number: (flips[number], number))
    else:
        chosen = positions.index(alpha)
    at = positions[chosen]
    details: dict[str, Any] = {
        "alpha": at,
        "form": form,
        "negative_flips": dict(zip(map(str, positions), flips, strict=True)),
        "negative_flip_rate": flips[chosen],
        "negative_flip_rate_of_new": flips[0],
    }
    coefficients = {"start": at} | {name: (1 - at) * share for name, share in shares.items()}
    return Soup(
        dict(path[chosen].load()),
        members,
        path[chosen].score,
        coefficients=coefficients,
        path=path,
        path_label="α: share of the old model",
        details=details,
    )


def fisher_line(
    new: Weights, old: Weights, share: float, importance: Weights, *, where: str = "the old model"
) -> dict[str, Tensor]:
    """Return (α F ⊙ old + (1 - α) · new) / (α F + 1 - α), element by element; tensors without F count it as 1.

    Where α is 1 and F is 0 neither model has a say, and the old one stays.
    """
    check_same(new, old, where=where)
    tied = tied_names(new)
    result: dict[str, Tensor] = {}
    for name, tensor in new.items():
        if name in tied:
            result[name] = result[tied[name]]
        elif not is_averaged(tensor):
            result[name] = tensor.clone()
        else:
            wide = accumulation_dtype(tensor.dtype)
            weight = share * importance[name].to(wide) if name in importance else torch.tensor(share, dtype=wide)
            total = weight + (1 - share)
            mean = (weight * old[name].to(wide) + (1 - share) * tensor.to(wide)) / total
            result[name] = torch.where(total == 0, old[name].to(wide), mean).to(tensor.dtype)
    return result


def _mean_one(information: dict[str, Tensor]) -> dict[str, Tensor]:
    count = sum(tensor.numel() for tensor in information.values())
    mean = sum(float(tensor.double().sum()) for tensor in information.values()) / max(1, count)
    if not mean > 0:
        raise ConfigError("The Fisher information is zero everywhere, so it cannot weigh anything; use form=plain.")
    return {name: tensor / mean for name, tensor in information.items()}
