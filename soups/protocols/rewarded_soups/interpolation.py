"""The weights between models tuned to different rewards, and preferences between those rewards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soups.errors import ConfigError
from soups.weights import RunningSum, Weights

# λ₁ … λₙ, which sum to 1.
Shares = tuple[float, ...]


def interpolate(models: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return θ_λ = Σ λᵢ θᵢ, summed as every average of the package (`soups.reduction`).

    Args:
        models: weights of equal names and shapes.
        shares: λᵢ, which sum to 1.

    Raises:
        ConfigError: shares that do not fit.
        soups.errors.WeightsError: models that do not fit each other.

    >>> import torch
    >>> interpolate([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [0.75, 0.25])["w"]
    tensor([1.])
    """
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-9:
        raise ConfigError(f"{len(models)} models need as many shares with the sum 1, not {list(shares)}.")
    total = RunningSum()
    for number, (weights, share) in enumerate(zip(models, shares, strict=True), 1):
        total.add(weights, where=f"model {number}", factor=share)
    return total.mean()


def preference(given: float | Sequence[float], rewards: int = 2) -> Shares:
    """Return a preference as its shares λ₁ … λₙ.

    Args:
        given: λ of the first of two rewards, or all shares.
        rewards: n.

    Raises:
        ConfigError: shares that are no preference between so many rewards, or one reward's alone.

    >>> preference(0.25), preference([0.5, 0.25, 0.25], 3)
    ((0.25, 0.75), (0.5, 0.25, 0.25))
    """
    shares = (float(given), 1 - float(given)) if isinstance(given, int | float) else tuple(map(float, given))
    if len(shares) != rewards or abs(sum(shares) - 1) > 1e-9 or any(not 0 <= share < 1 for share in shares):
        allowed = "λ between 0 and 1" if rewards == 2 else f"lists of {rewards} shares with the sum 1"
        raise ConfigError(
            f"protocol.study.shares and .multi_objective are {allowed}, the ends left out; {given} is none of them."
        )
    return shares


def label(shares: Shares) -> str:
    """Return what people are shown: λ of the first of two rewards, or all shares."""
    return f"λ = {', '.join(f'{share:g}' for share in (shares if len(shares) > 2 else shares[:1]))}"


def corner(number: int, rewards: int) -> Shares:
    """Return the shares of one reward alone."""
    return tuple(float(number == other) for other in range(rewards))
