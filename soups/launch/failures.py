"""Ingredients that failed: each reason once, and the exit code of a command that made its soup without them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

# Ingredients that are named beside one error.
_NAMED = 4


@dataclass(frozen=True)
class Failed:
    """An ingredient that failed: what tells it apart, and the error."""

    label: str
    why: str


def reasons(failed: Mapping[str, Failed]) -> list[str]:
    """Return each error once, with the ingredients that failed of it. Errors that differ in numbers alone are one.

    >>> reasons({"a" * 64: Failed("lr=1", "no disk"), "b" * 64: Failed("lr=2", "no disk")})
    ['2 of them (aaaaaaaa lr=1, bbbbbbbb lr=2): no disk']
    """
    first: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name, one in failed.items():
        why = first.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "#", one.why), one.why)
        groups.setdefault(why, []).append(f"{name[:8]} {one.label}".rstrip())
    return [
        f"{names[0]}: {why}"
        if len(names) == 1
        else f"{len(names)} of them ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}): {why}"
        for why, names in groups.items()
    ]


def tell_failures(console: Console, failed: Mapping[str, Failed]) -> int:
    """Show which ingredients failed and why, each reason once; return the exit code: 3 if some did."""
    if not failed:
        return 0
    count = f"{len(failed)} ingredient{' failed and is' if len(failed) == 1 else 's failed and are'} not in the soup"
    console.print(Panel(Text("\n".join(reasons(failed))), title=Text(count), style="red"))
    return 3


def leave(code: int) -> None:
    """End the program with an exit code, where Hydra would end it with 0."""
    if code:
        sys.exit(code)
