"""How sure a number is: intervals, paired tests, and what choosing by a score does to that score.

Everything here works on per-sample numbers: `right(logits, labels)` (bool) or `losses(logits, labels)` (nats), one a
sample and in the same order for all models. Two models are compared on the same samples, in pairs: what is hard for one
is mostly hard for the other, so that the paired difference is known far better than either score.

No interval repairs a choice: a score on the samples that chose the model is too good (`selection_effect`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from soups.errors import ConfigError, DataError, did_you_mean
from soups.seeding import generator

Alternative = Literal["two-sided", "greater"]
Select = Callable[[Tensor], Tensor]

# Resampled tables are made in pieces of at most this many numbers.
_CHUNK = 4_000_000


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which samples are classified correctly, bool (N,), from logits (N, classes) and labels (N,)."""
    _same_length(logits, labels)
    return logits.argmax(dim=1) == labels


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each sample in nats, float64 (N,), from logits (N, classes) and labels (N,)."""
    _same_length(logits, labels)
    return functional.cross_entropy(logits.double(), labels, reduction="none")


@dataclass(frozen=True)
class Interval:
    """A number and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def wilson(right: int, count: int, level: float = 0.95) -> Interval:
    """Return the accuracy right/count with Wilson's score interval.

    Every p that a normal test of size 1 − level does not reject: (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n).
    It stays inside [0, 1] and has a width at 0 and 1 too, where the textbook p̂ ± z·√(p̂(1−p̂)/n) has none.

    Raises:
        DataError: no samples, or more right ones than samples.

    >>> interval = wilson(8, 10)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.4902, 0.9433)
    """
    if not 0 <= right <= count or count < 1:
        raise DataError(f"An accuracy of {right} right among {count} samples does not exist.")
    z = _z(level)
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    return Interval(share, low, 1.0 if right == count else min(1.0, middle + half))


def mean_interval(values: Tensor, level: float = 0.95) -> Interval:
    """Return the mean of per-sample numbers (N,) ± z·s/√N, for a loss for example.

    Raises:
        DataError: fewer than two samples, or a value that is not finite.
    """
    values = _checked(values)
    half = _z(level) * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: Tensor, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of per-sample numbers (N,) with the percentile interval over resampled sets of samples.

    For losses of which few samples make the most, where ± z·s/√N is too symmetric. Of the difference of two models, give
    the per-sample differences: that is the paired bootstrap.

    Raises:
        DataError: fewer than two samples, or a value that is not finite.
    """
    values = _checked(values)
    count = len(values)
    source = generator(seed, "bootstrap", count)
    means: list[Tensor] = []
    for size in _pieces(resamples, count):
        means.append(values[torch.randint(count, (size, count), generator=source)].mean(dim=1))
    low, high = _percentiles(torch.cat(means), level)
    return Interval(float(values.mean()), low, high)


def mean_over_splits(groups: Sequence[Tensor], level: float = 0.95) -> Interval:
    """Return the mean over several splits, each counting the same, with its normal interval.

    Splits made of the same images (blurred, rotated, noisy) are not independent: they form one group (splits, images),
    and their scores are averaged per image first. Groups are of different images, and independent.

    Args:
        groups: per-sample scores, (splits, N) each; a single split may be (N,).
        level: of confidence.

    Raises:
        DataError: no groups, fewer than two images in one, or a value that is not finite.
    """
    if not groups:
        raise DataError("A mean over no splits was asked for.")
    tables = [group.double().reshape(-1, group.shape[-1]) for group in groups]
    splits = sum(len(table) for table in tables)
    mean = variance = 0.0
    for table in tables:
        values = _checked(table.mean(dim=0))
        share = len(table) / splits
        mean += share * float(values.mean())
        variance += share * share * float(values.var()) / len(values)
    half = _z(level) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """A challenger against a reference on the same samples.

    Attributes:
        difference: challenger's mean score minus the reference's, larger is better, with its interval.
        p_value: of the test that there is no difference.
        test: its name.
        gained: samples that the challenger scores higher on.
        lost: samples that the reference scores higher on.
        count: all samples.
    """

    difference: Interval
    p_value: float
    test: str
    gained: int
    lost: int
    count: int


def compare_accuracy(
    challenger: Tensor, reference: Tensor, level: float = 0.95, alternative: Alternative = "two-sided"
) -> Comparison:
    """Compare two models by which samples they get right, bool (N,) each: McNemar's exact test, Tango's interval.

    Only samples on which one is right and the other wrong count. If neither model is better, each of these falls to
    either side like a fair coin, so that the p-value is a binomial tail, exact at any size.

    The interval is the paired score interval (Tango 1998): all differences that its test does not reject. It has a width
    also when the models agree on every sample, where a bootstrap has none.

    Args:
        challenger, reference: bool (N,), of the same samples in the same order.
        level: of the interval.
        alternative: "greater" asks only whether the challenger is better. Decide before looking.

    Raises:
        DataError: not of one length, or empty.
        ConfigError: an unknown alternative.

    >>> ours = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    >>> theirs = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    >>> result = compare_accuracy(ours, theirs)
    >>> result.gained, result.lost, round(result.p_value, 5)
    (5, 1, 0.21875)
    """
    _known(alternative)
    _same_length(challenger, reference)
    challenger, reference = challenger.bool(), reference.bool()
    gained, lost = int((challenger & ~reference).sum()), int((~challenger & reference).sum())
    p_value = _binomial_tail(gained, lost)
    if alternative == "two-sided":
        p_value = min(1.0, 2 * min(p_value, _binomial_tail(lost, gained)))
    difference = _tango(gained, lost, len(challenger), level)
    return Comparison(difference, p_value, "exact McNemar", gained, lost, len(challenger))


def compare_losses(
    challenger: Tensor,
    reference: Tensor,
    level: float = 0.95,
    alternative: Alternative = "two-sided",
    resamples: int = 5000,
    seed: int = 0,
) -> Comparison:
    """Compare two models by per-sample losses (N,): sign-flip test and paired bootstrap of the difference.

    The difference is the reference's loss minus the challenger's, so that larger is better as everywhere. Where there is
    no difference, the sign of each sample's difference is a coin: the p-value is the share of random signs that give a
    mean as far out, counting the data itself, and never below 1/(resamples + 1).

    Args:
        challenger, reference: losses (N,) of the same samples in the same order.
        level: of the interval.
        alternative: "greater" asks only whether the challenger is better. Decide before looking.
        resamples: random sets of signs, and of samples.
        seed: of both.

    Raises:
        DataError: not of one length, fewer than two samples, or a loss that is not finite.
        ConfigError: an unknown alternative.
    """
    _known(alternative)
    _same_length(challenger, reference)
    better = _checked(reference.double() - challenger.double())
    count = len(better)
    source = generator(seed, "signs", count)
    found = float(better.sum())
    margin = 1e-12 * float(better.abs().sum())
    as_far = 0
    for size in _pieces(resamples, count):
        signs = torch.randint(2, (size, count), generator=source).double().mul_(2).sub_(1)
        sums = signs @ better
        as_far += int(((sums if alternative == "greater" else sums.abs())
                       >= (found if alternative == "greater" else abs(found)) - margin).sum())  # fmt: skip
    return Comparison(
        bootstrap_interval(better, level, resamples, seed),
        (1 + as_far) / (1 + resamples),
        "sign flips",
        int((better > 0).sum()),
        int((better < 0).sum()),
        count,
    )


def negative_flips(old: Tensor, new: Tensor, level: float = 0.95) -> Interval:
    """Return the negative-flip rate with Wilson's interval: the share of samples right before and wrong now.

    What users of an updated model notice (arXiv:2301.10546); it can grow while accuracy grows.

    Args:
        old, new: right or wrong, bool (N,), of the same samples.
        level: of the interval.

    Raises:
        DataError: not of one length, or empty.
    """
    _same_length(old, new)
    return wilson(int((old.bool() & ~new.bool()).sum()), len(old), level)


@dataclass(frozen=True)
class SelectionEffect:
    """How much better a chosen model looks on the samples that chose it.

    Attributes:
        optimism: reported minus true, its mean over the rounds; low and high hold `level` of the rounds. The rounds
            share one set of samples, so this is the spread of one such choice, not the precision of the mean.
        reported: mean score of what was chosen, on the samples that chose it.
        true: mean score of the same, on samples that did not choose it.
        samples: how many samples each round chose by.
        rounds: how many choices were made.
        method: "split" or "bootstrap".
    """

    optimism: Interval
    reported: float
    true: float
    samples: int
    rounds: int
    method: str


def selection_effect(
    select: Select,
    count: int,
    method: Literal["split", "bootstrap"] = "split",
    rounds: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> SelectionEffect:
    """Estimate reported minus true score of a way of choosing, by making the choice again on parts of the split.

    - "split": choose on a random half, look at the other half, then the other way round. Without bias for a split of half
      the size. With the whole split the effect is smaller: by √2 where all candidates are equally good.
    - "bootstrap": choose on N samples drawn with replacement; true is the score on the whole split. At the full size, but
      in a world where candidates differ by what they are *and* by the noise of this split, which makes choosing look
      safer than it is: by √2 where all are equally good.

    The truth for the whole split lies between the two.

    Args:
        select: makes the choice on samples given by their indices (n,), with repeats in a bootstrap, and returns the
            per-sample scores (N,) of what it chose, on all samples; larger is better. `best_single(scores)` is one;
            `soups.recipes.replay` turns any recipe into one.
        count: N.
        method: see above.
        rounds: choices to make.
        level: share of the rounds between `optimism.low` and `optimism.high`.
        seed: of the halves or the samples.

    Raises:
        DataError: fewer than four samples.
        ConfigError: an unknown method.

    >>> scores = torch.eye(8)  # eight models, each right on one sample of eight: all the same
    >>> effect = selection_effect(best_single(scores), 8)
    >>> effect.reported, effect.true, effect.optimism.value  # chosen for the one sample, which is not in the other half
    (0.25, 0.0, 0.25)
    """
    if method not in ("split", "bootstrap"):
        raise ConfigError(f"There is no method {method!r}: {did_you_mean(method, ['split', 'bootstrap'])}")
    if count < 4:
        raise DataError(f"The selection effect cannot be estimated on {count} samples; at least 4 are needed.")
    source = generator(seed, "selection effect", method, count)
    pairs: list[tuple[float, float]] = []
    while len(pairs) < rounds:
        if method == "split":
            order = torch.randperm(count, generator=source)
            halves = order[: count // 2], order[count // 2 :]
            tasks = [halves, halves[::-1]]
        else:
            tasks = [(torch.randint(count, (count,), generator=source), torch.arange(count))]
        for chosen_on, judged_on in tasks:
            scores = select(chosen_on).double()
            pairs.append((float(scores[chosen_on].mean()), float(scores[judged_on].mean())))
    reported, true = torch.tensor(pairs, dtype=torch.float64).T
    low, high = _percentiles(reported - true, level)
    return SelectionEffect(
        Interval(float((reported - true).mean()), low, high),
        float(reported.mean()),
        float(true.mean()),
        count // 2 if method == "split" else count,
        len(pairs),
        method,
    )


def best_single(scores: Tensor) -> Select:
    """Return the choice of the best of several models by per-sample scores (models, N); of equal ones, the first."""
    table = scores.double()

    def select(indices: Tensor) -> Tensor:
        return table[int(table[:, indices].mean(dim=1).argmax())]

    return select


@cache
def expected_maximum(count: int) -> float:
    """Return the mean of the largest of `count` independent standard normal numbers.

    >>> abs(expected_maximum(2) - 1 / math.sqrt(math.pi)) < 1e-9
    True
    """
    if count < 1:
        raise ConfigError(f"The largest of {count} numbers was asked for.")
    x = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    below = torch.special.ndtr(x)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(x * count * density * below ** (count - 1), x))


@dataclass(frozen=True)
class ChoiceNoise:
    """How much of the winner's lead chance alone would give.

    Attributes:
        expected: what the best of the candidates would lead their mean by if all were equally good: e_M · s, with e_M
            the mean of the largest of M standard normal numbers.
        lead: what the winner does lead their mean by.
        standard_error: s, the root mean square over candidates of the standard error of (candidate − mean candidate),
            paired by sample: difficulty that all share does not count.
        samples_needed: samples at which chance would give half of this lead; infinity without a lead.
    """

    expected: float
    lead: float
    standard_error: float
    samples_needed: float


def choice_noise(scores: Tensor) -> ChoiceNoise:
    """Set the lead of the best of M candidates against what chance gives, from per-sample scores (M, N).

    Raises:
        DataError: fewer than two candidates or two samples, or a value that is not finite.
    """
    if scores.ndim != 2 or scores.shape[0] < 2:
        raise DataError(
            f"Noise of a choice needs scores (models, samples) of at least two models, not {tuple(scores.shape)}."
        )
    models, count = scores.shape
    table = scores.double()
    deviations = table - table.mean(dim=0)
    _checked(deviations.flatten())
    if count < 2:
        raise DataError("Noise of a choice needs at least two samples.")
    # Subtracting the candidates' own mean takes away one M-th of each one's variance.
    variance = float(deviations.var(dim=1).mean()) * models / (models - 1)
    error = math.sqrt(variance / count)
    expected = expected_maximum(models) * error
    lead = float(deviations.mean(dim=1).max())
    needed = count * (2 * expected / lead) ** 2 if lead > 0 else math.inf
    return ChoiceNoise(expected, lead, error, needed)


def _tango(gained: int, lost: int, count: int, level: float) -> Interval:
    """Return (gained − lost)/count with the paired score interval, its ends found by bisection."""
    z = _z(level)
    difference = (gained - lost) / count

    def distance(delta: float) -> float:
        """The score statistic of the hypothesis that the difference is delta."""
        # The likelihood's maximum with p10 = q + delta, p01 = q: the positive root of a quadratic.
        linear = -(gained + lost) + (2 * count - gained + lost) * delta
        constant = -lost * delta * (1 - delta)
        q = (math.sqrt(max(0.0, linear * linear - 8 * count * constant)) - linear) / (4 * count)
        variance = max(0.0, count * (2 * q + delta * (1 - delta)))
        gap = gained - lost - count * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def end(outside: float, wanted: float) -> float:
        inside = difference
        for _ in range(200):
            middle = (inside + outside) / 2
            if middle in (inside, outside):
                break
            if abs(distance(middle)) <= wanted:
                inside = middle
            else:
                outside = middle
        return inside

    return Interval(difference, end(-1.0, z), end(1.0, z))


def _binomial_tail(least: int, others: int) -> float:
    """Return P(X ≥ least) for X ~ Binomial(least + others, ½), summed in logarithms."""
    tosses = least + others
    top = math.lgamma(tosses + 1) - tosses * math.log(2)
    return min(1.0, math.fsum(
        math.exp(top - math.lgamma(k + 1) - math.lgamma(tosses - k + 1)) for k in range(least, tosses + 1)
    ))  # fmt: skip


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError(f"A confidence level lies between 0 and 1, not at {level}; 0.95 is usual.")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _percentiles(values: Tensor, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ConfigError(f"A confidence level lies between 0 and 1, not at {level}; 0.95 is usual.")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values.double(), ends).tolist()
    return low, high


def _pieces(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK // max(1, width))
    return [min(size, total - begun) for begun in range(0, total, size)]


def _checked(values: Tensor) -> Tensor:
    values = values.double()
    if values.ndim != 1 or len(values) < 2:
        raise DataError(
            f"An interval needs at least two numbers in one row, not a tensor of shape {tuple(values.shape)}."
        )
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise DataError(f"{bad} of {len(values)} per-sample numbers are NaN or infinite; such a model has no interval.")
    return values


def _same_length(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second) or not len(first):
        raise DataError(
            f"Pairs need the same samples in the same order, at least one; here are {len(first)} and {len(second)}."
        )


def _known(alternative: str) -> None:
    if alternative not in ("two-sided", "greater"):
        raise ConfigError(
            f"There is no alternative {alternative!r}: {did_you_mean(alternative, ['two-sided', 'greater'])}"
        )
