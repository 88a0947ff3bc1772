"""How differently models err, and what averaging them can gain from it: measures from predictions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from soups.errors import ConfigError, WeightsError
from soups.stores import Store
from soups.stores.store import headers
from soups.weights import describe_mismatch

# Elements of each model that are compared at once.
_STRETCH = 1 << 18


@dataclass(frozen=True)
class Diversity:
    """Means over all pairs of models.

    Attributes:
        disagreement: share of samples with different predictions.
        ratio_error: samples that both have wrong with different predictions, over those with the same wrong one
            (Aksela, 2003; DiWA, arXiv:2205.09739, measures diversity by it). Infinite when no error is shared.
        q_statistic: Yule's Q of being right, in [-1, 1]: 1 where both are right and wrong together, 0 where
            independent; NaN where it is not defined.
    """

    disagreement: float
    ratio_error: float
    q_statistic: float


def diversity(logits: Sequence[Tensor], labels: Tensor) -> Diversity:
    """Return the diversity of two or more models from their logits, each (N, classes), on samples with `labels` (N,).

    Raises:
        ConfigError: fewer than two models.
    """
    if len(logits) < 2:
        raise ConfigError("Diversity is between two models at least.")
    predictions = [values.argmax(dim=1) for values in logits]
    pairs = list(combinations(predictions, 2))
    values = [
        (float((one != two).double().mean()), _ratio_error(one, two, labels), _q(one == labels, two == labels))
        for one, two in pairs
    ]
    disagreement, ratio, q = (sum(column) / len(pairs) for column in zip(*values, strict=True))
    return Diversity(disagreement, ratio, q)


def _ratio_error(one: Tensor, two: Tensor, labels: Tensor) -> float:
    both = (one != labels) & (two != labels)
    different, same = int((both & (one != two)).sum()), int((both & (one == two)).sum())
    return different / same if same else float("inf") if different else 0.0


def _q(one: Tensor, two: Tensor) -> float:
    right, wrong = int((one & two).sum()), int((~one & ~two).sum())
    first, second = int((one & ~two).sum()), int((~one & two).sum())
    below = right * wrong + first * second
    return (right * wrong - first * second) / below if below else float("nan")


def agreement(logits: Sequence[Tensor]) -> Tensor:
    """Return the share of samples on which each pair of models predicts the same class, float64 (M, M)."""
    predictions = torch.stack([values.argmax(dim=1) for values in logits])
    return (predictions[:, None] == predictions[None]).double().mean(dim=2)


def distances(models: Sequence[Store]) -> Tensor:
    """Return the Euclidean distances between models over all averaged tensors, float64 (M, M); tied ones count once.

    A stretch of one tensor of every model is in memory at a time.

    Args:
        models: the one nearest to all others first, where there is one (their start): rounding is least then.

    Raises:
        WeightsError: names or shapes differ.
    """
    ours = headers(models[0])
    for model in models[1:]:
        if mismatch := describe_mismatch(ours, headers(model)):
            raise WeightsError(f"{models[0].location} and {model.location} cannot be compared: {mismatch}")
    squares = torch.zeros(len(models), len(models), dtype=torch.float64)
    tied = models[0].tied()
    for name, tensor in ours.items():
        if name in tied or not tensor.dtype.is_floating_point:
            continue
        for start in range(0, tensor.numel(), _STRETCH):
            stop = min(start + _STRETCH, tensor.numel())
            flat = torch.stack([model.read_flat(name, start, stop).double() for model in models])
            # Inner products of differences from the first model: of the weights themselves they would cancel.
            flat -= flat[0].clone()
            inner = flat @ flat.T
            squares += inner.diagonal()[:, None] + inner.diagonal()[None] - 2 * inner
    return squares.clamp_min_(0).fill_diagonal_(0).sqrt()


@dataclass(frozen=True)
class Decomposition:
    """The squared error of an ensemble's probabilities, taken apart (DiWA, arXiv:2205.09739).

    `ensemble` = `bias` + `variance` / M + (M - 1) / M · `covariance`, exactly, for the averages that were measured.

    Attributes:
        bias: squared distance of the mean prediction from the one-hot label ("bias²").
        variance: of one member about that mean.
        covariance: between two members of one run.
        ensemble: squared error of the mean of M members, averaged over the runs.
        members: M.
    """

    bias: float
    variance: float
    covariance: float
    ensemble: float
    members: int


def decompose(logits: Tensor, labels: Tensor) -> Decomposition:
    """Take the squared error of ensembles apart into bias, variance and covariance.

    Args:
        logits: (runs, M, N, classes): M members of each of several runs, each run with training data of its own. With
            one run the mean prediction is that of its own ensemble, so that bias² is the ensemble's whole error and the
            covariance is −variance / (M − 1) whatever the members do: the terms then say nothing of diversity.
        labels: of the samples, which all runs share, (N,).

    Raises:
        ConfigError: fewer than two runs.

    DiWA adds the locality term O(Δ²) for an average of weights in place of predictions; `distances` gives Δ.
    """
    runs, members = logits.shape[:2]
    if runs < 2:
        raise ConfigError("Bias, variance and covariance need two runs at least, each on training data of its own.")
    probabilities = logits.double().softmax(dim=-1)
    target = functional.one_hot(labels, logits.shape[-1]).double()
    mean = probabilities.mean(dim=(0, 1))
    centred = probabilities - mean
    samples = logits.shape[2]
    variance = float(centred.square().sum()) / (runs * members * samples)
    together = float(centred.sum(dim=1).square().sum()) / (runs * samples)
    own = variance * members
    covariance = (together - own) / (members * (members - 1)) if members > 1 else 0.0
    ensemble = float((probabilities.mean(dim=1) - target).square().sum()) / (runs * samples)
    bias = float((mean - target).square().sum()) / samples
    return Decomposition(bias, variance, covariance, ensemble, members)


def locality(terms: Decomposition, soups: Tensor, labels: Tensor) -> float:
    """Return what averaging weights in place of predictions costs: the soups' squared error minus the ensembles'.

    It is what DiWA bounds by O(Δ²), measured; below zero where soups are better than ensembles.

    Args:
        terms: of the same runs.
        soups: logits of each run's soup, (runs, N, classes).
        labels: (N,).
    """
    target = functional.one_hot(labels, soups.shape[-1]).double()
    error = float((soups.double().softmax(dim=-1) - target).square().sum()) / (soups.shape[0] * soups.shape[1])
    return error - terms.ensemble


class Ambiguity(NamedTuple):
    """Squared errors of one ensemble's probabilities: `ensemble` = `members` − `ambiguity`, exactly.

    Attributes:
        ensemble: of the mean prediction.
        members: mean of the members' own.
        ambiguity: mean squared distance of the members from the mean prediction: what their differences gain.
    """

    ensemble: float
    members: float
    ambiguity: float


def ambiguity(logits: Sequence[Tensor], labels: Tensor) -> Ambiguity:
    """Take one ensemble's squared error apart (Krogh and Vedelsby, 1995), where `decompose` would need several runs.

    Args:
        logits: of the members, each (N, classes).
        labels: (N,).
    """
    probabilities = torch.stack([values.double().softmax(dim=-1) for values in logits])
    mean = probabilities.mean(dim=0)
    target = functional.one_hot(labels, mean.shape[-1]).double()
    samples, models = len(labels), len(probabilities)
    return Ambiguity(
        float((mean - target).square().sum()) / samples,
        float((probabilities - target).square().sum()) / (samples * models),
        float((probabilities - mean).square().sum()) / (samples * models),
    )


def error_correlation(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the correlation of being wrong between each pair of models, float64 (M, M); NaN for one without errors.

    1 where two models err on the same samples, 0 where independently.
    """
    wrong = torch.stack([values.argmax(dim=1) != labels for values in logits]).double()
    centred = wrong - wrong.mean(dim=1, keepdim=True)
    inner = centred @ centred.T
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms[None])


def cosines(distances: Tensor, base: int = 0) -> Tensor:
    """Return the cosines between task vectors θ_i − θ_base, float64 (M, M), from the models' distances, (M, M).

    NaN for the base itself, whose task vector is zero. Fine-tunes on one task point in a common direction (well above
    0), on unrelated tasks they are nearly orthogonal.
    """
    squares = distances.double().square()
    inner = (squares[base][:, None] + squares[base][None] - squares) / 2
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms[None])


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations (arXiv:1905.00414), in [0, 1].

    ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) of columns with mean 0; it does not change under rotation and uniform scaling of either. On
    logits it compares outputs, on features what the layers before the head have learned.

    Args:
        first, second: (N, features) of the same samples; the widths may differ.

    Raises:
        ConfigError: of different samples, or constant.
    """
    if len(first) != len(second):
        raise ConfigError(f"Representations of the same samples are compared; here are {len(first)} and {len(second)}.")
    x, y = (values.double().flatten(1) - values.double().flatten(1).mean(dim=0) for values in (first, second))
    below = float((x.T @ x).norm()) * float((y.T @ y).norm())
    if not below:
        raise ConfigError("A representation that is equal for all samples has no alignment with another.")
    return float((x.T @ y).square().sum()) / below
