"""Power-function EMA: an average whose length grows with training.

Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696), section 3 and appendix C:
β_t = (1 - 1/t)^(γ+1), so that a point at step τ has weight ∝ τ^γ at time t. The relative width
σ² = (γ+1)/((γ+2)²(γ+3)) is what the paper calls EMA length.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np

from soups.averaging.lerp import Lerp, lerp_
from soups.averaging.mean import MeanOptions
from soups.errors import ConfigError
from soups.weights import Weights


def gamma_of(sigma: float) -> float:
    """Return the exponent γ of the relative width σ (arXiv:2312.02696, equation 126 and algorithm 2).

    >>> round(gamma_of(0.05), 2), round(gamma_of(0.10), 2)
    (16.97, 6.94)

    Raises:
        ConfigError: σ outside (0, 0.288], where no profile with γ ≥ 0 exists.
    """
    if not 0 < sigma <= 12**-0.5 + 1e-12:
        raise ConfigError(f"sigma={sigma} must lie in (0, 0.288]; the paper tracks 0.05 and 0.10.")
    inverse = sigma**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(np.max(roots.real)))


def sigma_of(gamma: float) -> float:
    """Return the relative width σ of the exponent γ.

    >>> round(sigma_of(gamma_of(0.1)), 6)
    0.1
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


class PowerEMA(Lerp):
    """Power-function EMA of relative width σ.

    Args:
        sigma: relative width; 0.05 averages about the last tenth of training, 0.10 the last fifth.
        interval: steps between updates; it enters β, so that the width does not depend on it.
        **keep: dtype, device and more; see `MeanOptions`.
    """

    kind = "PowerEMA"

    def __init__(
        self,
        sigma: float = 0.05,
        *,
        interval: int = 1,
        **keep: Unpack[MeanOptions],
    ) -> None:
        super().__init__(**keep)
        if interval < 1:
            raise ConfigError(f"interval={interval} must be at least 1 step.")
        self.sigma, self.gamma, self.interval = sigma, gamma_of(sigma), interval

    def _next_weight(self) -> float:
        # With updates at t = k, 2k, ..., Δt/t is 1/(count + 1) whatever k is: the profile keeps its relative width.
        return -math.expm1((self.gamma + 1) * math.log1p(-1 / (self.count + 1)))

    def _scalars(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "gamma": self.gamma, "interval": self.interval}


def power_update_(average: Weights, weights: Weights, count: int, sigma: float = 0.05) -> None:
    """Update a power-function average in place: the plain function behind `PowerEMA`.

    Args:
        average: name to tensor; overwritten.
        weights: the same names and shapes; the new point.
        count: points taken in before this one; at 0 `average` becomes a copy.
        sigma: relative width.
    """
    weight = 1.0 if count == 0 else -math.expm1((gamma_of(sigma) + 1) * math.log1p(-1 / (count + 1)))
    lerp_(average, weights, weight)
