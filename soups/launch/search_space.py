"""From a search space, in Hydra's override grammar, to the overrides of each ingredient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from soups.errors import ConfigError
from soups.seeding import generator


def parse_space(space: Mapping[str, Any]) -> dict[str, Override]:
    """Parse a search space: keys to choice(…), range(…), interval(…), each optionally in tag(log, …), or a plain value.

    Raises:
        ConfigError: naming the key whose value is not in the grammar.
    """
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    for key, text in space.items():
        try:
            parsed[key] = parser.parse_override(f"{key}={text}")
        except HydraException as error:
            raise ConfigError(
                f"sweep.space.{key}={text} is not in Hydra's override grammar: {error}. Write choice(a, b), "
                f"range(start, stop), interval(low, high), int(interval(low, high)) or tag(log, interval(low, high))."
            ) from error
    return parsed


class Arguments(NamedTuple):
    """Command-line overrides of a sweep.

    Attributes:
        fixed: those that hold for every ingredient, as given.
        swept: the sweeping ones, by the key that they sweep.
        keys: of the fixed ones.
    """

    fixed: list[str]
    swept: dict[str, Override]
    keys: set[str]


_SPACE = "sweep.space."


def split_arguments(arguments: Sequence[str]) -> Arguments:
    """Split command-line overrides into those that hold for every ingredient and those that sweep.

    A sweep of an entry of the search space replaces the entry: `sweep.space.optimizer.lr=interval(1e-5, 1e-4)` sweeps
    `optimizer.lr`, as the same text in quotes does.

    Raises:
        ConfigError: an entry of the search space and its key are both given, so that one of them would be ignored.
    """
    fixed: list[str] = []
    sweeping: dict[str, Override] = {}
    keys: set[str] = set()
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    for text, override in zip(arguments, parsed, strict=True):
        key = override.get_key_element().lstrip("+~")
        if override.is_sweep_override():
            sweeping[key.removeprefix(_SPACE)] = override
        else:
            fixed.append(text)
            keys.add(key)
    given = {*keys, *(one.get_key_element().lstrip("+~") for one in parsed if one.is_sweep_override())}
    for override in parsed:
        key = override.get_key_element().lstrip("+~")
        plain = key.removeprefix(_SPACE)
        # Taking an entry out (null, ~) and giving its key a value agree with each other.
        if plain != key and plain in given and not override.is_delete() and override.value() is not None:
            raise ConfigError(
                f"{key} would be ignored: {plain} is given too, and wins over the search space. Keep one."
            )
    return Arguments(fixed, sweeping, keys)


def expand(space: Mapping[str, Override], method: str, size: int, seed: int) -> list[list[str]]:
    """Return one list of overrides for each ingredient.

    Random draws are independent by key and number: enlarging the sweep keeps the first ingredients, and removing a key
    keeps the draws of the others.

    Args:
        space: as `parse_space` returns it.
        method: "random" draws `size` points; "grid" takes every combination of choices and ranges.
        size: number of ingredients (random).
        seed: of the draw.

    Raises:
        ConfigError: an unknown method, or a grid over an interval.
    """
    if method == "random":
        return [
            [f"{key}={_draw(key, override, seed, number)}" for key, override in space.items()] for number in range(size)
        ]
    if method != "grid":
        raise ConfigError(f"sweep.method={method} must be random or grid.")
    axes = [[f"{key}={value}" for value in _values(key, override)] for key, override in space.items()]
    return [list(point) for point in itertools.product(*axes)]


def _is_log(sweep: ChoiceSweep | RangeSweep | IntervalSweep) -> bool:
    return "log" in sweep.tags


def _values(key: str, override: Override) -> list[str]:
    """Return all values of a choice or range, as override text."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        raise ConfigError(
            f"sweep.space.{key} is an interval, which has no finite grid: use choice(…) or range(…), or sweep.method=random."
        )
    if isinstance(value, (ChoiceSweep, RangeSweep)):
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _draw(key: str, override: Override, seed: int, number: int) -> str:
    source = generator(seed, "sweep", number, key)
    value: Any = override.value()
    if not isinstance(value, IntervalSweep):
        values = _values(key, override)
        return values[int(torch.randint(len(values), (), generator=source))]
    low, high = float(value.start or 0), float(value.end or 0)
    if not low < high or (_is_log(value) and low <= 0):
        positive = ", both positive under tag(log, …)" if _is_log(value) else ""
        raise ConfigError(f"sweep.space.{key}: interval({value.start}, {value.end}) needs low < high{positive}.")
    uniform = float(torch.rand((), generator=source, dtype=torch.float64))
    if _is_log(value):
        point = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        point = low + uniform * (high - low)
    if isinstance(value.start, int) and isinstance(value.end, int):
        return str(round(point))
    return f"{point:.4g}"
