"""Which settings tell ingredients apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def differences(configs: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Split settings, by dotted key, into those that differ between members and those that all share.

    A key that only some have differs.

    >>> differences({"a": {"lr": 1, "seed": 0}, "b": {"lr": 2, "seed": 0}})
    (['lr'], {'seed': 0})
    """
    flat = {name: flatten(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    absent = object()
    differing: list[str] = []
    shared: dict[str, Any] = {}
    for key in keys:
        values = [config.get(key, absent) for config in flat.values()]
        if all(_same(value, values[0]) for value in values):
            shared[key] = values[0]
        else:
            differing.append(key)
    return differing, shared


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; an empty section stays as it is.

    >>> flatten({"optimizer": {"lr": 0.1}, "callbacks": {}})
    {'optimizer.lr': 0.1, 'callbacks': {}}
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            result.update(flatten(cast(Mapping[str, Any], value), f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))
