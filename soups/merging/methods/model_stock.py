"""Model Stock: how far towards the fine-tunes' average the angle between them says to go.

Model Stock (arXiv:2403.19522), equation 7: t = N cos θ / (1 + (N − 1) cos θ);  w = t · mean(θ_i) + (1 − t) θ_0, tensor by
tensor. For more than two models the cosine is the mean over all pairs, as mergekit takes it; the paper has no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from soups.merging.gram import GramMethod, Matrix, Vector, norms_and_units


@dataclass(frozen=True)
class ModelStock(GramMethod):
    """w = t · mean(θ_i) + (1 − t) θ_0 with t from the mean cosine between task vectors."""

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    least: ClassVar[int] = 2

    def coefficients(self, gram: Matrix) -> Vector:
        """Return t / N for each task vector."""
        count = len(gram)
        units = norms_and_units(gram)[1]
        cosine = float((units.sum() - np.trace(units)) / (count * (count - 1)))
        divisor = 1 + (count - 1) * cosine
        t = 0.0 if divisor < 1e-6 else count * cosine / divisor
        return np.full(count, t / count)
