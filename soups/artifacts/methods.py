"""Every method with parts by name."""

from __future__ import annotations

from typing import Any

from soups.artifacts.bitdelta import BitDelta
from soups.artifacts.method import PartMethod
from soups.errors import ConfigError, did_you_mean

PART_METHODS: dict[str, type[PartMethod]] = {"bitdelta": BitDelta}


def make_part_method(name: str, **parameters: Any) -> PartMethod:
    """Make a method by its name.

    Raises:
        ConfigError: an unknown name or parameter.
    """
    if name not in PART_METHODS:
        raise ConfigError(f"There is no method with parts {name!r}; {did_you_mean(name, PART_METHODS)}")
    kind = PART_METHODS[name]
    allowed = list(getattr(kind, "__dataclass_fields__", {}))
    for parameter in parameters:
        if parameter not in allowed:
            hint = did_you_mean(parameter, allowed) if allowed else "it has none."
            raise ConfigError(f"{name} has no parameter {parameter!r}; {hint}")
    return kind(**parameters)
