"""What typed settings are made of: sections that refuse unknown names, number types, targets, and errors in one sentence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic_core import ErrorDetails

from soups.errors import ConfigError, did_you_mean

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the configuration. Immutable; an unknown name is an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    def plain(self) -> dict[str, Any]:
        """Return the settings that were given, as JSON values; defaults that nobody set are left out."""
        return self.model_dump(mode="json")

    def shallow(self) -> dict[str, Any]:
        """Return every setting by name, defaults too."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    @model_serializer(mode="wrap")
    def _given(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Always, also inside a message to another process: what was not given must not read as if it had been.
        return {name: value for name, value in serialise(self).items() if name in self.model_fields_set}


def part_of(kind: type[S], whole: Section) -> S:
    """Return the fields of a section that a narrower one has, as far as they were given."""
    given = whole.plain()
    return kind.model_validate({key: given[key] for key in kind.model_fields if key in given})


@dataclass(frozen=True)
class Must:
    """How an error message ends that refuses a value: "loader.size=many must be a positive whole number"."""

    be: str


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Must("a positive number")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Must("a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1), Must("a number in [0, 1]")]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), Must("a number in [0, 1)")]
Count = Annotated[int, Field(ge=1), Must("a positive whole number")]
CountOrNone = Annotated[int, Field(ge=0), Must("a whole number of at least 0")]
Seed = Annotated[int, Must("a whole number")]
Flag = Annotated[bool, Must("true or false")]
# `{_target_: module.function, argument: value}`.
Target = dict[str, Any]


def checked(kind: type[S], values: Any, prefix: str = "") -> S:
    """Return settings as a typed section.

    Args:
        kind: of the section.
        values: as composed, plain and resolved.
        prefix: of the keys in messages ("optimizer.").

    Raises:
        ConfigError: the first unknown name, with the nearest valid one, or the first value that is not allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # A misspelt name also leaves its setting missing: the unknown name says more.
        found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        raise ConfigError(_sentence(kind, found[0], prefix)) from None


def _sentence(kind: type[Section], error: ErrorDetails, prefix: str) -> str:
    place = error["loc"]
    if error["type"] != "extra_forbidden":
        place = _named(kind, place)
    key = prefix + ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        section = section_at(kind, place[:-1])
        return f"{key} is no setting: {did_you_mean(str(place[-1]), section.model_fields if section else [])}"
    if error["type"] == "missing":
        return f"{key} has no value: give it on the command line, {key}=…"
    if error["type"] == "value_error":
        return str(error.get("ctx", {}).get("error", error["msg"]))
    allowed = _allowed(kind, place)
    if error["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        if close := get_close_matches(str(error["input"]), names, n=1):
            return f"{key}={_shown(error['input'])} must be {allowed}: did you mean {close[0]!r}?"
    return f"{key}={_shown(error['input'])} must be {allowed or _lower(error['msg'])}."


def _named(kind: type[Section], place: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return a place without the parts that pydantic adds for the members of a union."""
    known = 0
    while known < len(place):
        section = section_at(kind, place[:known])
        if section is None or str(place[known]) not in section.model_fields:
            break
        known += 1
    return tuple(place[:known]) or tuple(place)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _lower(message: str) -> str:
    message = message.removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def _allowed(kind: type[Section], place: Sequence[int | str]) -> str | None:
    """Return what the field at a place allows, in words, if it says so."""
    for length in range(len(place), 0, -1):  # an error in a union or list ends in further parts
        section = section_at(kind, place[: length - 1])
        if section and (found := section.model_fields.get(str(place[length - 1]))):
            words = [one.be for one in found.metadata if isinstance(one, Must)] or [*_words(found.annotation)]
            optional = type(None) in get_args(found.annotation)
            return f"{words[0]}{', or null' if optional else ''}" if words else None
    return None


def _words(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Annotated:
        yield from (one.be for one in get_args(annotation)[1:] if isinstance(one, Must))
    elif get_origin(annotation) is Literal:
        names = [str(one) for one in get_args(annotation)]
        yield f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _words(part)


def section_at(kind: type[Section], place: Sequence[int | str]) -> type[Section] | None:
    """Return the kind of section at a place ("start", "optimizer"), or None where there is none."""
    section: type[Section] | None = kind
    for name in place:
        field = section.model_fields.get(str(name)) if section else None
        section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def target_of(section: Mapping[str, Any], name: str) -> Any:
    """Return the function or class that a section's `_target_` names.

    Raises:
        ConfigError: it cannot be imported.
    """
    target = str(section.get("_target_", ""))
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}._target_={target!r} cannot be imported: {error}.") from error


def arguments_of(function: Any) -> list[str] | None:
    """Return the names of a function's arguments, those of a typed `**options: Unpack[…]` too; None if it takes any."""
    names: list[str] = []
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a built-in type
        return None
    for parameter in parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
            continue
        try:
            hint = get_type_hints(getattr(function, "__init__", function))[parameter.name]
        except (NameError, KeyError):  # a name that exists for type checkers alone, or no annotation
            return None
        if get_origin(hint) is not Unpack:
            return None
        names += list(get_type_hints(get_args(hint)[0]))
    return names


def check_target(section: Mapping[str, Any], name: str, *given: str) -> Any:
    """Check a section against the signature of its target, which is returned.

    Args:
        section: with `_target_`.
        name: of the section, for messages.
        given: arguments that the program adds.

    Raises:
        ConfigError: the target cannot be imported, has no such argument, or lacks one.
    """
    function = target_of(section, name)
    values = {key: value for key, value in section.items() if key != "_target_"}
    known = arguments_of(function)
    allowed = [key for key in known or () if key not in given]
    if known is not None and (unknown := sorted(set(values) - set(allowed))):
        raise ConfigError(
            f"{name}.{unknown[0]} is no setting of {section['_target_']}: {did_you_mean(unknown[0], allowed)}"
        )
    try:
        if known is not None:
            inspect.signature(function).bind(**{**dict.fromkeys(given), **values})
    except TypeError as error:
        raise ConfigError(f"{name}: {section['_target_']} cannot be called with these settings: {error}.") from error
    return function


def build(section: Mapping[str, Any], name: str, **more: Any) -> Any:
    """Call what `section["_target_"]` names with the section's other values and `more`.

    Raises:
        ConfigError: there is no such function, or it takes no such argument.
    """
    function = check_target(section, name, *more)
    return function(**{**more, **{key: value for key, value in section.items() if key != "_target_"}})
