"""Lengths of training, and when points are due."""

from __future__ import annotations

import pytest

from soups.averaging.units import RunLength, Schedule, parse, steps
from soups.errors import ConfigError

PLAN = RunLength(steps_per_epoch=10, steps=80, epochs=8)


@pytest.mark.parametrize("text", ["", "10", "st", "-1st", "1.5st", "10 steps", "1e", "5%%", "nan%"])
def test_what_is_no_length(text):
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "length"), [("1000st", 1000), ("0.5ep", 5), ("1%", 0.8), ("1e3st", 1000), (" 2 ep ", 20), (7, 7)]
)
def test_lengths(text, length):
    assert steps(text, PLAN) == length


def points(start, every, plan=PLAN, *, last=False, epochs=8, per_epoch=10):
    schedule = Schedule(start, every, plan, last=last)
    return [
        step
        for step in range(1, epochs * per_epoch + 1)
        if schedule.due(step, (step - 1) // per_epoch + (step % per_epoch == 0), epoch_end=step % per_epoch == 0)
    ]


@pytest.mark.parametrize(
    ("start", "every", "last", "wanted"),
    [
        ("0st", "1ep", False, [10, 20, 30, 40, 50, 60, 70, 80]),
        ("1ep", "1ep", False, [10, 20, 30, 40, 50, 60, 70, 80]),
        ("3ep", "2ep", False, [30, 50, 70]),
        ("3ep", "2ep", True, [30, 50, 70, 80]),
        ("75%", "1ep", False, [60, 70, 80]),
        ("25st", "1ep", False, [30, 40, 50, 60, 70, 80]),
        ("0st", "30st", False, [30, 60]),
        ("0st", "30st", True, [30, 60, 80]),
        ("5st", "25st", False, [5, 30, 55, 80]),
        ("50%", "25%", False, [40, 60, 80]),
        ("1.5ep", "1.5ep", False, [15, 30, 45, 60, 75]),
        ("100st", "1st", True, []),
    ],
)
def test_schedules(start, every, last, wanted):
    assert points(start, every, last=last) == wanted


def test_streams_of_unknown_length():
    unknown = RunLength()
    assert points("2ep", "1ep", unknown, epochs=4) == [20, 30, 40]
    assert points("15st", "1ep", unknown, epochs=4) == [20, 30, 40]
    assert points("1ep", "15st", unknown, epochs=4) == [10, 25, 40]
    for start, every in (("0st", "0.5ep"), ("10%", "1ep"), ("0st", "1%")):
        with pytest.raises(ConfigError, match=r"not known|no planned length"):
            Schedule(start, every, unknown)


def test_no_spacing():
    with pytest.raises(ConfigError, match="takes no points"):
        Schedule("0st", "0st", PLAN)
