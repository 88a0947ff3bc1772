"""Profiles: how an average spreads its weight over the steps of a run.

Every average here is a set of weights over training steps that sum to one. `Power`, `Exponential` and `Window` give them
in closed form, as the share that lies at or before a step; post-hoc synthesis compares them with each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from soups.averaging.ema import decay_of
from soups.averaging.power import gamma_of
from soups.errors import ConfigError

Array = npt.NDArray[np.float64]


class Profile(ABC):
    """Weights over the steps 1 … end that sum to one."""

    end: int

    @abstractmethod
    def share(self, steps: Array) -> Array:
        """Return the weight that lies at or before each of `steps` (n,), from 0 to 1."""


@dataclass(frozen=True)
class Power(Profile):
    """Power-function EMA of relative width σ, as it stands at step `end` (arXiv:2312.02696).

    The weight of step τ is (τ^(γ+1) - (τ-1)^(γ+1)) / end^(γ+1), exactly what `PowerEMA` computes.
    """

    sigma: float
    end: int

    def share(self, steps: Array) -> Array:
        """Return the weight at or before each step."""
        return np.clip(steps / self.end, 0.0, 1.0) ** (gamma_of(self.sigma) + 1)


@dataclass(frozen=True)
class Exponential(Profile):
    """Debiased EMA of the given decay a step, as it stands at step `end`."""

    decay: float
    end: int

    @classmethod
    def of(cls, end: int, *, decay: float | None = None, half_life: float | None = None) -> Exponential:
        """Make the profile from a decay or a half-life in steps."""
        return cls(decay_of(decay, half_life), end)

    def share(self, steps: Array) -> Array:
        """Return the weight at or before each step."""
        log = np.log(self.decay)
        age = self.end - np.clip(steps, 0, self.end)
        return np.exp(age * log) * np.expm1((self.end - age) * log) / np.expm1(self.end * log)


@dataclass(frozen=True)
class Window(Profile):
    """Equal mean of the points at `end`, `end - every`, …: `count` of them (SWA, LAWA) or all after `start`."""

    end: int
    count: int
    every: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.every < 1 or self.end - (self.count - 1) * self.every < 1:
            raise ConfigError(
                f"A window of {self.count} points, {self.every} steps apart, does not fit before step {self.end}."
            )

    def share(self, steps: Array) -> Array:
        """Return the weight at or before each step."""
        first = self.end - (self.count - 1) * self.every
        return np.clip(np.floor((np.asarray(steps) - first) / self.every + 1e-9) + 1, 0, self.count) / self.count
