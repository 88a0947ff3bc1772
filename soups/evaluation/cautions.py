"""What a careful reader must be told before the numbers: short rules, each with its threshold in the open.

Every check returns a `Caution` or None. They are advice: nothing is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soups.evaluation.statistics import choice_noise, wilson
from soups.weights import Weights, is_averaged, tied_names


@dataclass(frozen=True)
class Caution:
    """One warning.

    Attributes:
        kind: "small-split", "noisy-choice", "one-kept", "basins", "heads" or "equal-weights".
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
