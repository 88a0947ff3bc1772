"""The loss over the plane through three models, with the others' places in it.

Coordinates follow arXiv:1802.10026: u = w₂ − w₁, v = (w₃ − w₁) − û⟨û, w₃ − w₁⟩, and w₁ + x·û + y·v̂ for û, v̂ of length 1.
All of it follows from pairwise distances, so that no direction is ever held in memory: every point of the plane is a
combination of the three models, and ⟨w_i − w₁, w_j − w₁⟩ = (d²_{1i} + d²_{1j} − d²_{ij}) / 2. BatchNorm: see `barrier`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.evaluation.barrier import Evaluate, Load, in_batches, point


@dataclass(frozen=True)
class Plane:
    """A plane through three models.

    Attributes:
        corners: numbers of the three, in the order of the distances they were given by.
        coordinates: (x, y) of every model's foot in the plane, in units of weight distance; the first corner is (0, 0),
            the second lies on the x-axis.
        heights: distance of every model from the plane; 0 for the corners.
    """

    corners: tuple[int, int, int]
    coordinates: list[tuple[float, float]]
    heights: list[float]

    def coefficients(self, x: float, y: float) -> tuple[float, float, float]:
        """Return what to multiply the three corners by to be at (x, y); they sum to 1."""
        width = self.coordinates[self.corners[1]][0]
        across, height = self.coordinates[self.corners[2]]
        third = y / height
        second = (x - third * across) / width
        return 1 - second - third, second, third

    def grid(self, size: int = 13, margin: float = 0.2) -> tuple[list[float], list[float]]:
        """Return x and y of a grid that holds all corners, with a margin as a share of the extent.

        Raises:
            ConfigError: fewer than two points a side.
        """
        if size < 2:
            raise ConfigError(f"A landscape needs two points a side, not {size}.")
        places = [self.coordinates[corner] for corner in self.corners]

        def axis(values: Sequence[float]) -> list[float]:
            low, high = min(values), max(values)
            low, high = low - margin * (high - low), high + margin * (high - low)
            return [low + step * (high - low) / (size - 1) for step in range(size)]

        return axis([x for x, _ in places]), axis([y for _, y in places])


def plane(distances: Tensor, corners: tuple[int, int, int] = (0, 1, 2)) -> Plane:
    """Return the plane through three models, from the distances between all models, (M, M).

    Raises:
        ConfigError: the three are not three different points, or lie on one line.
    """
    squares = distances.double().square()
    first, second, third = corners
    inner = (squares[first][:, None] + squares[first][None] - squares) / 2
    width = math.sqrt(float(inner[second, second]))
    across = float(inner[third, second]) / width if width else 0.0
    left = float(inner[third, third]) - across * across
    # What is left of rounding in distances is of the order of 1e-8 of the longest.
    if len(set(corners)) < 3 or not width or left <= 1e-12 * float(squares.max()):
        raise ConfigError(
            f"The models {corners} do not span a plane: two are equal, or all lie on one line. Choose three others; the "
            f"average of two lies on their line."
        )
    height = math.sqrt(left)
    x = inner[:, second] / width
    y = (inner[:, third] - across * x) / height
    above = (inner.diagonal() - x * x - y * y).clamp_min(0).sqrt()
    # The corners' own places are exact by definition.
    for corner, (cx, cy) in zip(corners, ((0.0, 0.0), (width, 0.0), (across, height)), strict=True):
        x[corner], y[corner], above[corner] = cx, cy, 0.0
    return Plane(corners, list(zip(x.tolist(), y.tolist(), strict=True)), above.tolist())


@dataclass(frozen=True)
class Landscape:
    """Numbers over a plane.

    Attributes:
        plane: with every model's place.
        xs, ys: of the grid.
        values: by name, (len(ys), len(xs)).
    """

    plane: Plane
    xs: list[float]
    ys: list[float]
    values: dict[str, list[list[float]]]


def landscape(
    loads: Sequence[Load],
    through: Plane,
    evaluate: Evaluate,
    xs: Sequence[float] | None = None,
    ys: Sequence[float] | None = None,
    batch: int = 1,
) -> Landscape:
    """Evaluate a grid over the plane through three models.

    Args:
        loads: of all models of the plane, in its order; only the corners are read, one at a time.
        through: the plane.
        evaluate: smaller is better.
        xs, ys: of the grid; by default `through.grid()`, 169 evaluations.
        batch: points given to `evaluate` at once.
    """
    default = through.grid()
    xs, ys = list(default[0] if xs is None else xs), list(default[1] if ys is None else ys)
    corners = [loads[corner] for corner in through.corners]
    points = (point(corners, through.coefficients(x, y)) for y in ys for x in xs)
    numbers = in_batches(points, evaluate, batch)
    rows = torch.arange(len(numbers)).reshape(len(ys), len(xs)).tolist()
    return Landscape(
        through, xs, ys, {name: [[float(numbers[k][name]) for k in row] for row in rows] for name in numbers[0]}
    )
