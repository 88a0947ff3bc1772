"""The learning-rate schedules of stochastic weight averaging, to be used or not.

No average in this package touches the learning rate. Whoever wants the schedule of arXiv:1803.05407 returns one of these from
`configure_optimizers`, as any other scheduler, and it is saved and resumed as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from soups.errors import ConfigError


def constant_swa(
    optimizer: Optimizer, *, start: int, swa_lr: float | Sequence[float], anneal: int | None = None
) -> LambdaLR:
    """Keep the initial rate, then go down linearly to `swa_lr` and stay there (arXiv:1803.05407, section 3.2).

    The released code keeps the rate for half of `start`, goes down until nine tenths of it, and then stays; this is that
    schedule when `anneal` is None.

    Args:
        optimizer: its `lr` is the initial rate, of every parameter group.
        start: scheduler steps (batches or epochs, as Lightning's `interval` says) after which `swa_lr` holds.
        swa_lr: the constant rate of the averaging phase, one for all parameter groups or one for each.
        anneal: steps the way down takes, ending at `start`; None for the released code's.

    Raises:
        ConfigError: a length or rate that is not positive, or another number of rates than of parameter groups.
    """
    groups = optimizer.param_groups
    rates = [float(swa_lr)] * len(groups) if isinstance(swa_lr, int | float) else [float(rate) for rate in swa_lr]
    if len(rates) != len(groups):
        raise ConfigError(
            f"swa_lr={swa_lr} has {len(rates)} rates and the optimizer {len(groups)} parameter groups. Give one rate for all, "
            f"or one for each group in their order."
        )
    if start < 1 or min(rates) <= 0 or (anneal is not None and not 0 < anneal <= start):
        raise ConfigError(
            f"start={start}, swa_lr={swa_lr} and anneal={anneal} must be positive, and anneal within start."
        )
    begin, end = (0.5 * start, 0.9 * start) if anneal is None else (float(start - anneal), float(start))

    def factor(base: float, rate: float) -> object:
        ratio = rate / base
        return lambda step: ratio + (1 - ratio) * min(1.0, max(0.0, (end - step) / (end - begin)))  # pyright: ignore[reportUnknownVariableType]

    return LambdaLR(optimizer, [factor(group["lr"], rate) for group, rate in zip(groups, rates, strict=True)])  # type: ignore[list-item]


def cyclic_swa(optimizer: Optimizer, *, start: int, cycle: int, high: float, low: float) -> LambdaLR:
    """From `start` on, fall linearly from `high` to `low` in every cycle (arXiv:1803.05407, equation 1).

    Before `start` the rate is the optimizer's own. Take the points at the ends of cycles: `SWA(start=..., every=cycle)`.

    Args:
        optimizer: its `lr` holds before `start`.
        start: scheduler steps before the first cycle.
        cycle: steps in a cycle.
        high: rate at a cycle's beginning.
        low: rate at a cycle's end.

    Raises:
        ConfigError: no cycle, or rates out of order.
    """
    if cycle < 1 or start < 0 or not 0 < low <= high:
        raise ConfigError(f"start={start}, cycle={cycle}, high={high}, low={low}: need cycle ≥ 1 and 0 < low ≤ high.")

    def factor(base: float) -> object:
        def at(step: int) -> float:
            if step < start:
                return 1.0
            share = ((step - start) % cycle + 1) / cycle
            return ((1 - share) * high + share * low) / base

        return at

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])  # type: ignore[list-item]
