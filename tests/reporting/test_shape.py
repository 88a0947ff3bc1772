"""Paths, barriers and landscapes as parts of a page: the numbers are those that were measured, in the units shown."""

import pytest
import torch

from soups.evaluation.barrier import Barrier, along, one_by_one
from soups.evaluation.diversity import distances
from soups.evaluation.landscape import landscape, plane
from soups.reporting.page import Matrix, Scatter
from soups.reporting.shape import barrier_matrix, landscape_parts, path_curves
from soups.stores import DictStore


def point(x: float, y: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([x, y], dtype=torch.float64)}


hill = one_by_one(lambda w: {"error": float((w["w"][0] * (1 - w["w"][0])).clamp(min=0))})


def test_a_path_shows_its_straight_line_and_its_barrier() -> None:
    models = [point(0, 0), point(1, 0), point(1, 1)]
    part = path_curves(along([lambda m=m: m for m in models], hill, steps=5), ["start", "a", "soup"], "error", "Way")
    assert part.x == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert part.series["error"] == pytest.approx([0, 18.75, 25, 18.75, 0, 0, 0, 0, 0])
    assert part.series["straight line"] == pytest.approx([0] * 9)
    assert "straight line: 25 (error, %), at 0.5" in part.note and "0 is start, 1 is a, 2 is soup" in part.note


def test_barriers_fill_both_halves_and_leave_infinite_ones_blank() -> None:
    found = {("a", "b"): Barrier(0.03, 0.5), ("a", "c"): Barrier(float("inf"), 0.5), ("b", "c"): Barrier(0.0, 0.0)}
    part = barrier_matrix(found, ["c", "a", "b"], "error")
    assert part.values == [[0, None, 0], [None, 0, 3], [0, 3, 0]]
    assert part.row_labels == ["c", "a", "b"]


def test_a_landscape_is_shown_with_the_highest_row_first() -> None:
    models = [point(0, 0), point(2, 0), point(0, 1), point(1, 0.5)]
    through = plane(distances([DictStore(m, "m") for m in models]))
    values = one_by_one(lambda w: {"loss": float(w["w"][0] + 10 * w["w"][1])})
    found = landscape([lambda m=m: m for m in models], through, values, [0.0, 2.0], [0.0, 1.0])
    heatmap, places = landscape_parts(found, ["start", "a", "b", "soup"], "loss")
    assert isinstance(heatmap, Matrix) and isinstance(places, Scatter)
    assert heatmap.row_labels == ["1", "0"] and heatmap.column_labels == ["0", "2"]
    assert [value for row in heatmap.values for value in row] == pytest.approx([10, 12, 0, 2])
    soup = places.groups["others, seen from above"][0]
    assert (soup.name, soup.x, soup.y) == ("soup", pytest.approx(1), pytest.approx(0.5))
    assert [p.name for p in places.groups["the plane goes through"]] == ["start", "a", "b"]
