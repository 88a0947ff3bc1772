"""Parts of a page from paths, barriers and landscapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from soups.evaluation.barrier import Barrier, Path
from soups.evaluation.landscape import Landscape
from soups.reporting.page import ChartPoint, Curves, Matrix, Scatter

_UNITS = {"error": ("error, %", 100.0), "loss": ("cross-entropy, nats", 1.0)}


def path_curves(path: Path, names: Sequence[str], number: str, title: str, note: str = "") -> Curves:
    """Return a number along a path, with the straight line between the models that it is measured against.

    Args:
        path: through models at the whole positions.
        names: of those models.
        number: "loss" or "error".
        title: of the part.
        note: what to say besides the barrier.
    """
    label, scale = _UNITS.get(number, (number, 1.0))
    found = path.values[number]
    knots = {int(p): v for p, v in zip(path.positions, found, strict=True) if p == int(p)}
    straight: list[float | None] = []
    for position in path.positions:
        begin = min(int(position), max(knots) - 1)
        share = position - begin
        straight.append(_finite(scale * ((1 - share) * knots[begin] + share * knots[begin + 1])))
    high = path.barrier(number)
    middle = "at its end" if high.position == int(high.position) else f"at {high.position:g}"
    barrier = "infinite" if math.isinf(high.height) else f"{scale * high.height:.3g}"
    places = ", ".join(f"{place} is {name}" for place, name in enumerate(names))
    return Curves(
        title=title,
        note=f"Highest above the straight line: {barrier} ({label}), {middle}. Position {places}. {note}".rstrip(),
        x_label="position",
        y_label=label,
        x=list(path.positions),
        series={number: [_finite(scale * value) for value in found], "straight line": straight},
    )


def barrier_matrix(barriers: Mapping[tuple[str, str], Barrier], names: Sequence[str], number: str) -> Matrix:
    """Return a heatmap of the barriers between all pairs of models.

    Args:
        barriers: by pair of names, each pair once.
        names: in the order of the axes.
        number: "loss" or "error".
    """
    label, scale = _UNITS.get(number, (number, 1.0))
    values: list[list[float | None]] = [[0.0 if one == two else None for two in names] for one in names]
    place = {name: row for row, name in enumerate(names)}
    for (one, two), found in barriers.items():
        height = _finite(scale * found.height)
        values[place[one]][place[two]] = values[place[two]][place[one]] = height
    return Matrix(
        title="Barriers between ingredients",
        note="How far the line between two models rises above its ends' mean level. Near 0 they lie in one basin, where "
        "averages work. Infinite barriers are left blank.",
        row_labels=list(names),
        column_labels=list(names),
        values=values,
        value_label=f"barrier, {label}",
    )


def landscape_parts(found: Landscape, names: Sequence[str], number: str) -> list[Matrix | Scatter]:
    """Return the landscape as a heatmap, and where the models lie in its plane.

    Args:
        found: the landscape.
        names: of all models of its plane, in their order.
        number: "loss" or "error".
    """
    label, scale = _UNITS.get(number, (number, 1.0))
    corners = [names[corner] for corner in found.plane.corners]
    order = range(len(found.ys) - 1, -1, -1)
    heatmap = Matrix(
        title="Landscape",
        note=f"Over the plane through {corners[0]} (at 0, 0), {corners[1]} (right) and {corners[2]} (up); axes are distances "
        f"between weights.",
        row_labels=[f"{found.ys[row]:.3g}" for row in order],
        column_labels=[f"{x:.3g}" for x in found.xs],
        values=[[_finite(scale * value) for value in found.values[number][row]] for row in order],
        value_label=label,
    )
    points = {
        name: ChartPoint(name=name, x=x, y=y, details={"distance from the plane": f"{height:.3g}"})
        for name, (x, y), height in zip(names, found.plane.coordinates, found.plane.heights, strict=True)
    }
    through = set(corners)
    groups = {
        "the plane goes through": [point for name, point in points.items() if name in through],
        "others, seen from above": [point for name, point in points.items() if name not in through],
    }
    places = Scatter(
        title="Where the models lie in the plane",
        note="The foot of each model in the plane of the landscape; most lie far above it.",
        x_label="distance along the first edge",
        y_label="distance from it",
        groups={name: group for name, group in groups.items() if group},
    )
    return [heatmap, places]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
