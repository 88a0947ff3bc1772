"""Paths, barriers and planes on losses whose values are known, and which models are in memory meanwhile."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError, WeightsError
from soups.evaluation.barrier import Barrier, Path, along, barrier, barriers, one_by_one, point
from soups.evaluation.diversity import distances
from soups.evaluation.landscape import landscape, plane
from soups.stores import DictStore


def weights(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64), "steps": torch.tensor(7)}


def double_well(several) -> list[dict[str, float]]:
    """(x² − 1)² + y²: minima at x = ±1, y = 0, and a barrier of 1 between them."""
    return [{"loss": float((w["w"][0] ** 2 - 1) ** 2 + w["w"][1] ** 2)} for w in several]


def test_the_barrier_of_a_double_well() -> None:
    path = along([lambda: weights(-1, 0), lambda: weights(1, 0)], double_well)
    assert path.positions == [round(k / 10, 12) for k in range(11)]
    assert path.values["loss"] == pytest.approx([((2 * a - 1) ** 2 - 1) ** 2 for a in path.positions])
    assert path.barrier("loss") == pytest.approx(Barrier(1.0, 0.5))


def test_a_convex_loss_has_no_barrier_and_a_tilted_one_depends_on_the_baseline() -> None:
    bowl = one_by_one(lambda w: {"loss": float(w["w"].square().sum())})
    path = along([lambda: weights(0, 0), lambda: weights(2, 0)], bowl)
    assert path.barrier("loss").height == 0, "the ends themselves"
    assert path.barrier("loss", "mean") == pytest.approx((4 - 2, 1.0)), "the worse end against the mean of both"
    assert barrier([0, 1], [3.0, 1.0]) == Barrier(0.0, 0.0)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), curve=st.floats(0.1, 5), steps=st.sampled_from([3, 5, 11, 21]))
@settings(max_examples=50, deadline=None)
def test_the_barrier_of_a_parabola_is_known(a: float, b: float, curve: float, steps: int) -> None:
    """−c x²: above its chord by c·α(1 − α)(b − a)², at most in the middle."""
    path = along(
        [lambda: weights(a), lambda: weights(b)], one_by_one(lambda w: {"v": -curve * float(w["w"] ** 2)}), steps
    )
    assert path.barrier("v").height == pytest.approx(curve * (b - a) ** 2 / 4, abs=1e-9)


def test_what_is_not_finite_is_an_infinite_barrier() -> None:
    assert barrier([0, 0.5, 1], [1.0, float("nan"), 1.0]) == Barrier(float("inf"), 0.5)


def test_a_path_through_three_models_evaluates_the_middle_one_once() -> None:
    seen: list[float] = []

    def values(several):
        seen.extend(float(w["w"][0]) for w in several)
        return [{"loss": float(w["w"][0] == 1.5)} for w in several]

    models = [weights(0.0), weights(1.0), weights(3.0)]
    path = along([lambda m=m: m for m in models], values, steps=5, batch=4)
    assert path.positions == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3])
    assert path.barrier("loss") == pytest.approx((1.0, 1.25)), "the second stretch"
    assert isinstance(path, Path)


def test_pairs_evaluate_their_ends_once() -> None:
    calls = 0

    def count(several):
        nonlocal calls
        calls += len(several)
        return double_well(several)

    loads = {"a": lambda: weights(-1, 0), "b": lambda: weights(1, 0), "c": lambda: weights(1, 1)}
    found = barriers(loads, count, steps=5)["loss"]
    assert calls == 3 + 3 * 3
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "b"] == pytest.approx((1.0, 0.5)) and found["b", "c"].height == 0
    with pytest.raises(ConfigError, match="three steps"):
        barriers(loads, count, steps=2)


def test_integer_tensors_come_from_the_first_and_dtypes_stay() -> None:
    first = {"w": torch.tensor([1.0]), "steps": torch.tensor(3)}
    second = {"w": torch.tensor([2.0]), "steps": torch.tensor(9)}
    made = point([lambda: first, lambda: second], [0.0, 1.0])
    assert made["w"].dtype == torch.float32 and made["w"].item() == 2 and made["steps"].item() == 3
    with pytest.raises(ConfigError, match="sum to 1"):
        point([lambda: first, lambda: second], [0.5, 0.6])
    with pytest.raises(WeightsError, match="model number 1 does not fit"):
        point([lambda: first, lambda: {"w": torch.zeros(2)}], [0.5, 0.5])


def test_two_models_and_one_point_are_in_memory() -> None:
    alive: list[weakref.ref] = []

    def load(value: float):
        tensor = torch.full((8,), value)
        alive.append(weakref.ref(tensor))
        return {"w": tensor}

    most = 0

    def values(several):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        return [{"loss": 0.0} for _ in several]

    along([lambda k=k: load(float(k)) for k in range(5)], values, steps=3)
    barriers({str(k): (lambda k=k: load(float(k))) for k in range(4)}, values)
    assert most == 2


@given(seed=st.integers(0, 10**6), models=st.integers(3, 6))
@settings(max_examples=30, deadline=None)
def test_coordinates_are_those_of_an_orthonormal_basis(seed: int, models: int) -> None:
    source = torch.Generator().manual_seed(seed)
    table = torch.randn(models, 12, generator=source, dtype=torch.float64)
    gaps = distances([DictStore({"a": row[:5], "b": row[5:]}, "m") for row in table])
    found = plane(gaps, (1, 0, 2))
    u = table[0] - table[1]
    u = u / u.norm()
    v = table[2] - table[1]
    v = v - u * (u @ v)
    v = v / v.norm()
    for row, (x, y), height in zip(table, found.coordinates, found.heights, strict=True):
        delta = row - table[1]
        assert (x, y) == pytest.approx((float(delta @ u), float(delta @ v)), abs=1e-6)
        assert height == pytest.approx(float((delta - u * (u @ delta) - v * (v @ delta)).norm()), abs=1e-5)
    # Any place of the plane is the combination that its coordinates say.
    x, y = 0.3, -1.7
    mix = sum(c * table[k] for c, k in zip(found.coefficients(x, y), found.corners, strict=True))
    assert torch.allclose(mix, table[1] + x * u + y * v, atol=1e-8)
    for corner, unit in zip(found.corners, torch.eye(3).tolist(), strict=True):
        assert found.coefficients(*found.coordinates[corner]) == pytest.approx(unit, abs=1e-12)


def test_a_landscape_has_the_loss_of_every_place() -> None:
    models = [weights(0, 0), weights(2, 0), weights(0, 1), weights(1, 1)]
    gaps = distances([DictStore({"w": m["w"]}, "m") for m in models])
    through = plane(gaps)
    found = landscape(
        [lambda m=m: m for m in models], through, double_well, xs=[-1.0, 0.0, 1.0], ys=[0.0, 2.0], batch=4
    )
    expected = [[(x * x - 1) ** 2 + y * y for x in (-1.0, 0.0, 1.0)] for y in (0.0, 2.0)]
    assert [value for row in found.values["loss"] for value in row] == pytest.approx(
        [v for row in expected for v in row]
    )
    assert through.coordinates[3] == pytest.approx((1, 1)) and through.heights[3] == pytest.approx(0, abs=1e-7)
    xs, ys = through.grid(5, margin=0.5)
    assert xs == pytest.approx([-1, 0, 1, 2, 3]) and ys == pytest.approx([-0.5, 0, 0.5, 1, 1.5])


def test_mistakes() -> None:
    line = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    with pytest.raises(ConfigError, match="do not span a plane"):
        plane(line)
    with pytest.raises(ConfigError, match="do not span a plane"):
        plane(line, (0, 0, 1))
    with pytest.raises(ConfigError, match="two points a side"):
        plane(torch.ones(3, 3) - torch.eye(3)).grid(1)
    with pytest.raises(ConfigError, match="did you mean 'line'"):
        barrier([0, 1], [0.0, 0.0], "lin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two points and a value"):
        barrier([0], [0.0])
    with pytest.raises(ConfigError, match="two models"):
        along([lambda: weights(0)], double_well)
    with pytest.raises(ConfigError, match="batch=0"):
        along([lambda: weights(0, 0), lambda: weights(1, 0)], double_well, batch=0)
