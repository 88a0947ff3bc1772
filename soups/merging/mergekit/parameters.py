"""Which value a parameter has for one tensor: gradients over layers, filters by name, and who takes precedence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from soups.errors import ConfigError
from soups.merging.mergekit.schema import Conditional, Parameters, Scalar, Setting

REQUIRED = object()

Value = float | int | bool | tuple[str, ...]
"""A parameter's value for one tensor."""


def gradient(values: list[Scalar], t: float) -> Scalar:
    """Return the value at t ∈ [0, 1] of a list spread evenly over the layers, interpolated between numbers.

    >>> gradient([0, 1], 0.25), gradient([0, 10, 0], 0.5), gradient([1.0], 0.7)
    (0.25, 10.0, 1.0)
    """
    place = t * (len(values) - 1)
    low = int(place)
    first = values[low]
    if isinstance(first, bool | str):
        return first
    second = values[min(low + 1, len(values) - 1)]
    if isinstance(second, bool | str):
        raise ValueError(f"the gradient {values} mixes numbers with other values")
    return (1 - (place - low)) * first + (place - low) * second


def value_of(setting: Setting, name: str, t: float) -> Scalar | None:
    """Return a setting's value for one tensor, or `None` if none of its filters matches; the first that does counts.

    >>> value_of([Conditional(value=1, filter="mlp"), Conditional(value=0.5)], "layers.0.mlp.w", 0)
    1
    """
    if isinstance(setting, Conditional):
        return value_of([setting], name, t)
    if not isinstance(setting, list):
        return setting
    if not setting:
        raise ValueError("an empty list")
    if isinstance(setting[0], Conditional):
        for item in setting:
            assert isinstance(item, Conditional)
            if item.applies(name):
                return gradient(item.value, t) if isinstance(item.value, list) else item.value
        return None
    return gradient([item for item in setting if not isinstance(item, Conditional)], t)


@dataclass(frozen=True)
class Parameter:
    """A parameter as mergekit has it.

    Attributes:
        name: in the file.
        field: the method's own name for it; empty where it changes nothing (memory, in mergekit).
        kind: what it is converted to; "names" are patterns of tensor names, for which a list is no gradient.
        default: its value when it is not given; `REQUIRED` where it must be.
        each: whether each model has its own value.
    """

    name: str
    field: str
    kind: Literal["float", "bool", "int", "names"] = "float"
    default: Any = REQUIRED
    each: bool = False

    def convert(self, value: Scalar, where: str) -> Value:
        """Return the value in its kind; YAML reads `1e-1` as text.

        Raises:
            ConfigError: it cannot be.
        """
        try:
            if self.kind == "bool":
                known = {"true": True, "1": True, "false": False, "0": False}
                return value if isinstance(value, bool) else known[str(value).lower().removesuffix(".0")]
            if self.kind == "names":
                return (str(value),)
            number = float(value)
            return int(number) if self.kind == "int" else number
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{where}: {self.name}: {value!r} is no {self.kind}.") from error

    def look_up(self, levels: Iterable[Parameters | None], name: str, t: float, where: str) -> Value:
        """Return the first value that a level has for a tensor, else the default.

        Args:
            levels: the source's parameters, the slice's, the module's, the document's.
            name: the tensor's.
            t: its place among the layers.
            where: for messages.

        Raises:
            ConfigError: the parameter is required and no level has a value for this tensor.
        """
        for level in levels:
            if level and self.name in level:
                setting = level[self.name]
                if self.kind == "names" and isinstance(setting, list):
                    return tuple(str(item) for item in setting)
                try:
                    value = value_of(setting, name, t)
                except ValueError as error:
                    raise ConfigError(f"{where}: {self.name}: {error}.") from error
                if value is not None:
                    return self.convert(value, where)
        if self.default is REQUIRED:
            raise ConfigError(
                f"{where}: parameter {self.name!r} is required and has no value for tensor {name!r}. Set it under "
                f"parameters of the model, or at the end of a list of filters without a filter."
            )
        return self.default


def names_of(levels: Iterable[Mapping[str, Any] | None]) -> set[str]:
    """Return every parameter name that occurs."""
    return {name for level in levels if level for name in level}
