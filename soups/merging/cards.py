"""The card of a merge method: what it does, when it fails, its parameters, all read from its docstring and signature."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soups.errors import ConfigError

_SECTION = re.compile(r"^(Attributes|Args):$", re.MULTILINE)
_FAILS = re.compile(r"^When it fails: (.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class ParameterCard:
    """One parameter of a method.

    Attributes:
        name: as in Python, and in a configuration under the registered name.
        type: "float", "int", "bool" or "names" (patterns of tensor names).
        default: its value when it is not given.
        per_model: whether it may be one value for each model.
        text: what it is.
    """

    name: str
    type: str
    default: Any
    per_model: bool
    text: str


@dataclass(frozen=True)
class Card:
    """What there is to know of a method.

    Attributes:
        name: its registered name.
        source: the paper, or the public code whose behaviour it has.
        summary: one line.
        idea: the method in a few paragraphs.
        fails: when it fails.
        base: "required", "optional" or "none".
        models: how many models it takes besides the base, as text.
        statistics: the kinds of statistics that it needs.
        parameters: in the order of the signature.
    """

    name: str
    source: str
    summary: str
    idea: str
    fails: str
    base: str
    models: str
    statistics: tuple[str, ...]
    parameters: tuple[ParameterCard, ...]


def card(name: str, make: Callable[..., Any], source: str) -> Card:
    """Return a method's card.

    Args:
        name: its registered name.
        make: the class or function that makes it.
        source: where it is from.

    Raises:
        ConfigError: its docstring lacks a paragraph "When it fails:" (the module's serves as well), or a parameter.
    """
    own = inspect.getdoc(make) or ""
    module = inspect.getdoc(sys.modules[make.__module__]) or ""
    fails = _FAILS.search(own) or _FAILS.search(module)
    if fails is None:
        raise ConfigError(
            f"The docstring of {name}, or of its module, needs a paragraph that begins 'When it fails: '."
        )
    method = make()
    return Card(
        name,
        source,
        own.splitlines()[0],
        "\n\n".join(dict.fromkeys(part for text in (own, module) if (part := _prose(text)))),
        " ".join(fails[1].split()),
        method.base,
        _how_many(method.least, method.most),
        method.statistics,
        tuple(_parameters(name, make, own)),
    )


def _prose(text: str) -> str:
    section = _SECTION.search(text)
    body = text[: section.start()] if section else text
    return _FAILS.sub("", body).strip()


def _how_many(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _parameters(name: str, make: Callable[..., Any], text: str) -> list[ParameterCard]:
    texts = _texts(text)
    if not texts:  # a preset's parameters are those of the method that its module begins with
        for other in vars(sys.modules[make.__module__]).values():
            if callable(other) and getattr(other, "__module__", None) == make.__module__:
                texts = {**_texts(inspect.getdoc(other) or ""), **texts}
    found: list[ParameterCard] = []
    for parameter in inspect.signature(make).parameters.values():
        if parameter.name not in texts:
            raise ConfigError(f"The docstring of {name} says nothing of its parameter {parameter.name!r}.")
        kind, per_model = _type_of(str(parameter.annotation))
        found.append(ParameterCard(parameter.name, kind, parameter.default, per_model, texts[parameter.name]))
    return found


def _type_of(annotation: str) -> tuple[str, bool]:
    """Return a parameter's type, and whether it may be one value for each model.

    >>> _type_of("PerModel"), _type_of("float | None"), _type_of("tuple[str, ...]")
    (('float', True), ('float', False), ('names', False))
    """
    known = {"PerModel": ("float", True), "tuple[str, ...]": ("names", False)}
    plain = annotation.removesuffix(" | None")
    if plain in known:
        return known[plain]
    if plain in ("float", "int", "bool"):
        return plain, False
    raise ConfigError(
        f"A parameter of type {annotation} cannot be set in a configuration; use float, int, bool or PerModel."
    )


def _texts(text: str) -> dict[str, str]:
    """Return what a docstring's Attributes or Args say of each name."""
    section = _SECTION.search(text)
    found: dict[str, str] = {}
    name = ""
    for line in text[section.end() :].splitlines() if section else []:
        entry = re.match(r"^    (\w+): (.*)$", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif line.startswith("        ") and name:
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found
