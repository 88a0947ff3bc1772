"""What a careful reader must be told before the numbers: short rules, each with its threshold in the open.

Every check returns a `Caution` or None. They are advice: nothing is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soups.evaluation.statistics import choice_noise, wilson
from soups.weights import Weights, is_averaged, tied_names


@dataclass(frozen=True)
class Caution:
    """One warning.

    Attributes:
        kind: "small-split", "noisy-choice", "one-kept", "basins", "heads", "equal-weights" or "batchnorm".
        message: one paragraph: what was found, what it means, what to do.
        numbers: what the rule looked at.
    """

    kind: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])


def small_split(right: int, count: int, half_width: float = 0.05, level: float = 0.95) -> Caution | None:
    """Caution when the best held-out accuracy is not known to `half_width` (half of Wilson's interval)."""
    interval = wilson(right, count, level)
    if interval.half_width <= half_width:
        return None
    return Caution(
        "small-split",
        f"The held-out split has {count} samples: an accuracy of {interval.value:.1%} on it means anything from "
        f"{interval.low:.1%} to {interval.high:.1%} ({level:.0%} interval). What it chooses is close to chance; hold out "
        f"more, or use the uniform soup, which chooses nothing.",
        {"count": float(count), "half_width": interval.half_width},
    )


def noisy_choice(scores: Tensor, share: float = 0.5) -> Caution | None:
    """Caution when chance gives more than `share` of the winner's lead over the mean candidate (`choice_noise`).

    Args:
        scores: per-sample scores of the candidates on the held-out split, (models, N); larger is better.
        share: of the lead.
    """
    models, count = scores.shape
    if models < 2:
        return None
    noise = choice_noise(scores)
    if noise.lead > 0 and noise.expected <= share * noise.lead:
        return None
    found = "all have the same score" if noise.lead <= 0 else f"the best leads their mean by {noise.lead:.4f}"
    needed = (
        f" About {math.ceil(noise.samples_needed * (0.5 / share) ** 2):,} samples would do."
        if math.isfinite(noise.samples_needed)
        else ""
    )
    return Caution(
        "noisy-choice",
        f"The held-out split is small for {models} candidates: {found}, and the best of {models} equally good ones would "
        f"lead by {noise.expected:.4f} on {count} samples by chance alone. Do not read the best single model's held-out "
        f"score as its true one.{needed}",
        {"expected": noise.expected, "lead": noise.lead, "standard_error": noise.standard_error},
    )


def one_kept(kept: int, tried: int) -> Caution | None:
    """Caution when the search rejected all candidates but one."""
    if kept != 1 or tried < 2:
        return None
    return Caution(
        "one-kept",
        f"The soup is the best single model: all {tried - 1} others were rejected. That happens when ingredients lie in "
        f"different basins (another pretraining, learning rates too high), when their heads were initialised separately, "
        f"or when the best is far ahead. Look at the barrier between the best two.",
        {"kept": float(kept), "tried": float(tried)},
    )


def different_basins(
    barriers: Mapping[tuple[str, str], float], threshold: float = 0.02, what: str = "error"
) -> Caution | None:
    """Caution when a barrier between two ingredients is above a threshold.

    2 points of error are what arXiv:1912.05671 counts as noise.

    Args:
        barriers: heights by pair of names.
        threshold: in the unit of the barriers.
        what: the curve they are of.
    """
    high = {pair: value for pair, value in barriers.items() if not value <= threshold}
    if not high:
        return None
    (first, second), worst = max(high.items(), key=lambda item: item[1] if item[1] == item[1] else math.inf)
    return Caution(
        "basins",
        f"{len(high)} of {len(barriers)} pairs of ingredients have an {what} barrier above {threshold:g}; the highest is "
        f"{worst:.4g}, between {first} and {second}. They lie in different basins, where averages are worse than what goes "
        f"in. Fine-tune from one start with a shared head and a lower learning rate, or align the models first.",
        {"highest": worst, "pairs": float(len(high))},
    )


def unshared_tensors(first: Weights, second: Weights, below: float = 0.5) -> list[str]:
    """Return the matrices (and larger) of two models whose cosine is below `below`, where most others' is not.

    Fine-tuning from one start turns a tensor little; tensors that were initialised separately are orthogonal but for
    chance. Nothing is returned when more than half of the parameters are like that: then the models share no start at all.
    """
    tied = tied_names(first)
    odd: list[str] = []
    odd_size = size = 0
    for name, tensor in first.items():
        if name in tied or tensor.ndim < 2 or not is_averaged(tensor) or name not in second:
            continue
        a, b = tensor.detach().double().flatten(), second[name].detach().double().flatten()
        if a.shape != b.shape:
            continue
        norms = float(a.norm()) * float(b.norm())
        size += a.numel()
        if norms > 0 and float(torch.dot(a, b)) / norms < below:
            odd.append(name)
            odd_size += a.numel()
    return odd if odd_size <= size / 2 else []


def different_heads(tensors: Mapping[str, Sequence[str]]) -> Caution | None:
    """Caution when ingredients have tensors of separate initialisation.

    Args:
        tensors: `unshared_tensors` against the first ingredient, by name of the other.
    """
    found = {name: list(names) for name, names in tensors.items() if names}
    if not found:
        return None
    every = sorted({name for names in found.values() for name in names})
    shown = ", ".join(map(repr, every[:4])) + (f" and {len(every) - 4} more" if len(every) > 4 else "")
    return Caution(
        "heads",
        f"{len(found)} of {len(tensors)} ingredients do not share {shown} with the first: nearly orthogonal, as after "
        f"separate initialisation. Averages of such heads lose accuracy when the head has more than one layer. Save the "
        f"head once, best after a linear probe, and start every fine-tune from it.",
        {"ingredients": float(len(found)), "tensors": float(len(every))},
    )


def running_statistics(names: Iterable[str]) -> list[str]:
    """Return which tensor names are BatchNorm's running means and variances.

    >>> running_statistics(["bn.weight", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"])
    ['bn.running_mean', 'bn.running_var']
    """
    return [name for name in names if name.rpartition(".")[2] in ("running_mean", "running_var")]


def statistics_gaps(first: Weights, second: Weights) -> dict[str, float]:
    """Return by BatchNorm layer how far two models' running statistics are from each other.

    The larger of two root mean squares over channels: of the difference of the means, over the standard deviation; and of
    the difference of the logarithms of the standard deviations. So 0.1 is a tenth of a standard deviation, or 10 % of it.

    Args:
        first, second: state dicts, or their running statistics alone.
    """
    gaps: dict[str, float] = {}
    for name in running_statistics(first):
        layer, _, kind = name.rpartition(".")
        other = f"{layer}.running_var" if layer else "running_var"
        if kind != "running_mean" or other not in first or name not in second or other not in second:
            continue
        means = first[name].double() - second[name].double()
        # The constant that PyTorch's layers add by default: channels that are always off have no variance.
        one, two = (weights[other].double() + 1e-5 for weights in (first, second))
        shift = means.square() / ((one + two) / 2)
        spread = ((one / two).log() / 2).square()
        gaps[layer] = math.sqrt(max(float(shift.mean()), float(spread.mean())))
    return gaps


def averaged_statistics(
    gaps: Mapping[str, Mapping[str, float]],
    accuracies: tuple[float, float] | None = None,
    threshold: float = 0.01,
    remedy: str = "soup.batchnorm=reestimate measures them on training data, for every candidate.",
) -> Caution | None:
    """Caution when BatchNorm statistics that differ are averaged: those of an average of weights are no such average.

    Args:
        gaps: `statistics_gaps` from the first ingredient, by name of the other.
        accuracies: held-out accuracy of the uniform soup as it is, and with statistics measured for it, where known.
        threshold: of the largest gap; rounding of half-precision files stays below it.
        remedy: what to do.
    """
    every = {(name, layer): gap for name, layers in gaps.items() for layer, gap in layers.items()}
    differ = {key: gap for key, gap in every.items() if not gap <= threshold}
    if not differ:
        return None
    (name, layer), worst = max(differ.items(), key=lambda item: item[1])
    found = ""
    numbers = {"largest": worst, "ingredients": float(len({name for name, _ in differ}))}
    if accuracies is not None:
        found = f" Here the uniform soup has a held-out accuracy of {accuracies[0]:.1%}; with measured ones, {accuracies[1]:.1%}."
        numbers |= {"averaged": accuracies[0], "measured": accuracies[1]}
    return Caution(
        "batchnorm",
        f"BatchNorm's running statistics differ between ingredients, by up to {worst:.2g} standard deviations (layer "
        f"{layer!r} of {name}), and a soup gets their averages: statistics that belong to no weights, since activations of "
        f"averaged weights vary less. Between fine-tunes that stayed close this costs little; after high learning rates or "
        f"long training it can cost everything, and searches then reject good ingredients.{found} {remedy}",
        numbers,
    )


def equal_weights(hashes: Mapping[str, str]) -> Caution | None:
    """Caution when ingredients have the same weights, given the hash of each."""
    groups: dict[str, list[str]] = {}
    for name, value in hashes.items():
        groups.setdefault(value, []).append(name)
    repeated = [names for names in groups.values() if len(names) > 1]
    if not repeated:
        return None
    listed = "; ".join(" = ".join(names) for names in repeated[:4]) + ("; …" if len(repeated) > 4 else "")
    return Caution(
        "equal-weights",
        f"Some ingredients have exactly the same weights ({listed}): they count twice in a uniform soup and add nothing. "
        f"Two runs with one seed, or one file twice? Leave one out of each.",
        {"groups": float(len(repeated)), "ingredients": float(sum(map(len, repeated)))},
    )
