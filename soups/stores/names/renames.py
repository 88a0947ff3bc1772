"""Renames that the user gives: regular expressions and what they turn into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from soups.errors import ConfigError


@dataclass(frozen=True)
class Renames:
    """Regular expressions, each applied once to every tensor's name, in order.

    >>> Renames({r"^encoder\\.": "bert.encoder."})("encoder.layer.0.w")
    'bert.encoder.layer.0.w'
    """

    table: Mapping[str, str]

    def __post_init__(self) -> None:
        for old, new in self.table.items():
            try:
                re.sub(old, new, "")
            except (re.error, IndexError) as error:
                raise ConfigError(
                    f"rename: {old!r} to {new!r} is no regular expression with a replacement ({error}). Write a dot as \\. "
                    f"and a group of the expression as \\1."
                ) from error

    def __call__(self, name: str) -> str:
        """Return a tensor's new name."""
        for old, new in self.table.items():
            name = re.sub(old, new, name, count=1)
        return name


def parse_renames(pairs: Iterable[str]) -> Renames:
    """Return the renames of a command line: `OLD=NEW` each.

    >>> parse_renames(["^model=net"]).table
    {'^model': 'net'}

    Raises:
        ConfigError: a pair without `=`, or an expression that is none.
    """
    table: dict[str, str] = {}
    for pair in pairs:
        old, sign, new = pair.partition("=")
        if not sign or not old:
            raise ConfigError(f"--rename {pair!r} is no pair. Write OLD=NEW: a regular expression and its replacement.")
        table[old] = new
    return Renames(table)
