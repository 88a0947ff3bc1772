"""Lengths of training in the user's unit, and when a point is due.

`"1000st"` is 1000 optimizer steps, `"0.5ep"` half an epoch, `"1%"` a hundredth of the planned run. A step here is a
training batch after which at least one optimizer moved the weights: gradient accumulation, several optimizers and
steps skipped by mixed precision are all counted as the weights see them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from soups.errors import ConfigError

_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(st|ep|%)\s*")


@dataclass(frozen=True)
class RunLength:
    """What is known of a run before it starts; None for what is not.

    Attributes:
        steps_per_epoch: optimizer steps in one epoch; the mean over the run, rounded up, where epochs differ.
        steps: optimizer steps of the whole planned run.
        epochs: epochs of the whole planned run.
        lengths: steps of the first epochs where they differ (a schedule of gradient accumulation); later epochs are as the
            last of them.
    """

    steps_per_epoch: int | None = None
    steps: int | None = None
    epochs: int | None = None
    lengths: tuple[int, ...] = ()

    def steps_after(self, epochs: float) -> float:
        """Return the optimizer steps in the first epochs of the run.

        >>> RunLength(steps_per_epoch=10).steps_after(1.5), RunLength(steps_per_epoch=8, lengths=(10, 5)).steps_after(2.5)
        (15.0, 17.5)

        Raises:
            ConfigError: the length of an epoch is not known.
        """
        if self.steps_per_epoch is None:
            raise ConfigError("The length of an epoch is not known.")
        if not self.lengths:
            return epochs * self.steps_per_epoch
        whole = int(epochs)
        seen = sum(self.lengths[:whole]) + self.lengths[-1] * max(0, whole - len(self.lengths))
        return seen + (epochs - whole) * self.lengths[min(whole, len(self.lengths) - 1)]


class Span(NamedTuple):
    """A length of training: a number and its unit."""

    number: float
    unit: Literal["st", "ep", "%"]

    def __str__(self) -> str:
        return f"{self.number:g}{self.unit}"

    @property
    def whole_epochs(self) -> bool:
        """Whether this is a whole number of epochs, which needs no knowledge of their length."""
        return self.unit == "ep" and self.number == int(self.number)

    def steps(self, plan: RunLength) -> float:
        """Return the length in optimizer steps, not rounded.

        Raises:
            ConfigError: the plan does not hold what the unit needs.
        """
        if self.unit == "st":
            return self.number
        if self.unit == "ep":
            if plan.steps_per_epoch is None:
                raise ConfigError(
                    f"'{self}' cannot be turned into steps, since the length of an epoch is not known (a streamed data "
                    f"set?). Give it in optimizer steps, as in '1000st', or set Trainer(limit_train_batches=...)."
                )
            return self.number * plan.steps_per_epoch
        if plan.steps is None:
            raise ConfigError(
                f"'{self}' is a share of the planned run, and this run has no planned length. Set max_epochs or "
                f"max_steps on the Trainer, or give the length in steps ('1000st') or epochs ('2ep')."
            )
        return self.number / 100 * plan.steps


def parse(text: str | Span) -> Span:
    """Read a length of training.

    >>> parse("1000st"), str(parse("0.5 ep")), parse("1%").steps(RunLength(steps=4000))
    (Span(number=1000.0, unit='st'), '0.5ep', 40.0)

    Raises:
        ConfigError: no number, no unit, an unknown unit, or a step count that is not whole.
    """
    if isinstance(text, Span):
        return text
    match = _PATTERN.fullmatch(str(text))
    if match is None:
        raise ConfigError(
            f"{text!r} is not a length of training. Write a number and a unit: '1000st' (optimizer steps), '0.5ep' "
            f"(epochs) or '1%' (of the planned run)."
        )
    span = Span(float(match[1]), match[2])  # type: ignore[arg-type]
    if span.unit == "st" and span.number != int(span.number):
        raise ConfigError(f"{text!r} is not a whole number of steps; write '{round(span.number)}st'.")
    return span


def steps(text: str | Span | float, plan: RunLength | None = None) -> float:
    """Return a length in optimizer steps: a plain number is taken as such, a string is parsed.

    >>> steps(100), steps("100st"), steps("2ep", RunLength(steps_per_epoch=25))
    (100.0, 100.0, 50.0)

    Raises:
        ConfigError: the string is no length, or needs a plan that was not given.
    """
    return float(text) if isinstance(text, int | float) else parse(text).steps(plan or RunLength())


class Schedule:
    """Says after which steps and epochs a point is taken.

    A spacing in whole epochs takes points at the ends of epochs; any other spacing counts steps. `start` is where the
    first point lies (`start="1ep"`: the end of the first epoch; `"0st"`: as early as the spacing allows).

    Args:
        start: where the first point lies.
        every: spacing of the points.
        plan: lengths of this run.
        last: also take the last step of the planned run when the spacing misses it.

    >>> schedule = Schedule("75%", "1ep", RunLength(steps_per_epoch=5, steps=40, epochs=8))
    >>> [epoch for epoch in range(1, 9) if schedule.due(5 * epoch, epoch, epoch_end=True)]
    [6, 7, 8]

    Raises:
        ConfigError: a spacing of nothing, or a unit that this run cannot resolve.
    """

    def __init__(self, start: str | Span, every: str | Span, plan: RunLength, *, last: bool = False) -> None:
        self.start, self.every, self.plan = parse(start), parse(every), plan
        if self.start.unit == "%" and self.start.number > 100:
            raise ConfigError(
                f"start='{self.start}' lies beyond the end of the planned run, so no point would ever be taken. Give at most "
                f"'100%'."
            )
        if self.every.number <= 0:
            raise ConfigError(
                f"every='{self.every}' takes no points. Give a spacing above zero, as in '1ep' or '100st'."
            )
        self.by_epoch = self.every.whole_epochs
        self.last = last
        # The step, or in `by_epoch` the epoch, at which counting begins; None until it has been reached where the plan
        # cannot tell beforehand. It is part of the state that a resumed run needs.
        self.origin: int | None = self._origin()
        self._spacing = int(self.every.number) if self.by_epoch else max(1, round(self.every.steps(plan)))

    def _origin(self) -> int | None:
        span = self.start
        if self.by_epoch:
            if span.unit == "ep" or span.number == 0:
                return math.ceil(span.number)
            if span.unit == "%" and self.plan.epochs is not None and not self.plan.lengths:
                return math.ceil(span.number / 100 * self.plan.epochs - 1e-9)
            if self.plan.steps_per_epoch is None:
                span.steps(self.plan)  # fails here, at the start, if it can never be resolved
                return None
            first, wanted = 1, span.steps(self.plan) - 1e-9
            while self.plan.steps_after(first) < wanted:
                first += 1
            return first if wanted > 0 else 0
        if span.whole_epochs and span.number and self.plan.steps_per_epoch is None:
            return None
        if span.unit == "ep" and self.plan.steps_per_epoch is not None:
            return math.ceil(self.plan.steps_after(span.number) - 1e-9)
        return math.ceil(span.steps(self.plan) - 1e-9)

    def _reached(self, step: int, epoch: int) -> bool:
        if self.start.unit == "ep":
            return epoch >= self.start.number
        return step >= self.start.steps(self.plan)

    def regular(self, step: int, epoch: int, *, epoch_end: bool) -> bool:
        """Tell whether a point that is due is due by the spacing, and not only as the last step of the planned run."""
        if self.by_epoch and not epoch_end:
            return False
        now = epoch if self.by_epoch else step
        return self.origin is not None and (now - self.origin) % self._spacing == 0

    @property
    def spacing(self) -> int:
        """Steps between two points, or epochs where the spacing is in whole epochs."""
        return self._spacing

    def due(self, step: int, epoch: int, *, epoch_end: bool) -> bool:
        """Tell whether a point is taken now.

        Args:
            step: optimizer steps taken so far, at least 1.
            epoch: epochs completed, the one that ends now included.
            epoch_end: whether this is the end of an epoch.
        """
        if self.by_epoch and not epoch_end:
            return self.last and step == self.plan.steps and self.origin is not None and epoch >= self.origin
        now = epoch if self.by_epoch else step
        if self.origin is None:
            if not self._reached(step, epoch):
                return False
            self.origin = now
        if now < max(self.origin, 1):
            return False
        return (now - self.origin) % self._spacing == 0 or (self.last and step == self.plan.steps)
