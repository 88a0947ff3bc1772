"""Hydra's grammar as a search space: every form, seeded draws, and mistakes that are named."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError
from soups.launch.search_space import expand, parse_space, split_arguments

SPACE = {
    "optimizer.lr": "tag(log, interval(1e-4, 1e-2))",
    "task.label_smoothing": "choice(0.0, 0.1)",
    "augment.magnitude": "range(2, 9, 3)",
    "width": "int(interval(1, 9))",
    "seed": "range(0, 1000)",
    "model.name": "resnet18",
}


def values(points: list[list[str]], key: str) -> list[str]:
    return [dict(text.split("=", 1) for text in point)[key] for point in points]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_draws_stay_in_their_ranges(seed: int) -> None:
    points = expand(parse_space(SPACE), "random", 20, seed)
    assert all(1e-4 <= float(value) <= 1e-2 for value in values(points, "optimizer.lr"))
    assert set(values(points, "task.label_smoothing")) <= {"0.0", "0.1"}
    assert set(values(points, "augment.magnitude")) <= {"2", "5", "8"}
    assert all(float(value).is_integer() and 1 <= float(value) <= 9 for value in values(points, "width"))
    assert set(values(points, "model.name")) == {"resnet18"}


def test_log_intervals_are_uniform_in_the_logarithm() -> None:
    points = expand(parse_space({"lr": SPACE["optimizer.lr"]}), "random", 2000, 0)
    logs = [math.log10(float(value)) for value in values(points, "lr")]
    assert sum(logs) / len(logs) == pytest.approx(-3, abs=0.05)
    assert sum(value < -3 for value in logs) / len(logs) == pytest.approx(0.5, abs=0.05)


def test_enlarging_a_sweep_keeps_its_first_ingredients() -> None:
    space = parse_space(SPACE)
    assert expand(space, "random", 12, 3)[:5] == expand(space, "random", 5, 3)
    assert expand(space, "random", 5, 3) != expand(space, "random", 5, 4)


def test_fixing_one_key_keeps_the_draws_of_the_others() -> None:
    less = {key: text for key, text in SPACE.items() if key != "task.label_smoothing"}
    full, part = (expand(parse_space(space), "random", 6, 0) for space in (SPACE, less))
    assert [[text for text in point if "smoothing" not in text] for point in full] == part


def test_grid_takes_every_combination() -> None:
    points = expand(parse_space({"a": "choice(x, y)", "b": "range(0, 3)", "c": "7"}), "grid", 1, 0)
    assert len(points) == 6 and points[0] == ["a=x", "b=0", "c=7"] and len({tuple(point) for point in points}) == 6


def test_the_command_line_is_split() -> None:
    fixed, swept, keys = split_arguments(["+soup=greedy", "optimizer.lr=1e-4,3e-4", "seed=range(0,3)", "a.b=2"])
    assert fixed == ["+soup=greedy", "a.b=2"] and keys == {"soup", "a.b"}
    assert values(expand(swept, "grid", 0, 0), "optimizer.lr") == ["0.0001"] * 3 + ["0.0003"] * 3


@pytest.mark.parametrize(
    ("space", "method", "message"),
    [
        ({"lr": "interval(1, 2"}, "random", r"sweep\.space\.lr=interval\(1, 2 is not in Hydra's override grammar"),
        ({"lr": "interval(1.0, 2.0)"}, "grid", "has no finite grid"),
        ({"lr": "interval(2.0, 1.0)"}, "random", "needs low < high"),
        ({"lr": "tag(log, interval(-1.0, 1.0))"}, "random", "both positive"),
        ({"lr": "choice(1, 2)"}, "bayes", "must be random or grid"),
    ],
)
def test_mistakes(space: dict[str, str], method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(parse_space(space), method, 3, 0)
