"""Layers by tensor name, for any architecture: what comes before them, in which layer a tensor is, what comes after."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"^((?:.*?\.)??)(\d+)\.")
_BEFORE = re.compile(r"embed|wte|wpe|tok_|cls_token|stem|patch", re.IGNORECASE)


class Position(NamedTuple):
    """Where a tensor is.

    Attributes:
        stack: what the layers' names begin with (`model.layers.`); `None` outside of layers.
        layer: its layer's number; −1 before the layers, and the number of layers after them.
        rest: its name within the layer; the whole name outside.
    """

    stack: str | None
    layer: int
    rest: str

    def name(self, layer: int) -> str:
        """Return the tensor's name in another layer."""
        return self.rest if self.stack is None else f"{self.stack}{layer}.{self.rest}"


class Layers:
    """The layers of one set of tensor names.

    >>> names = ["embed.weight", "h.0.w", "h.1.w", "norm.weight"]
    >>> layers = Layers(names)
    >>> layers.count("h."), layers.place("h.1.w"), layers.place("norm.weight").layer
    (2, Position(stack='h.', layer=1, rest='w'), 2)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._counts: dict[str, int] = {}
        for name in names:
            if match := _LAYER.match(name):
                stack = match[1]
                self._counts[stack] = max(self._counts.get(stack, 0), int(match[2]) + 1)

    @property
    def stacks(self) -> list[str]:
        """What the layers' names begin with; several for architectures of several towers or stages."""
        return list(self._counts)

    def count(self, stack: str) -> int:
        """Return how many layers a stack has."""
        return self._counts[stack]

    def place(self, name: str) -> Position:
        """Return where a tensor is."""
        if match := _LAYER.match(name):
            return Position(match[1], int(match[2]), name[match.end() :])
        return Position(None, -1 if _BEFORE.search(name) else max(self._counts.values(), default=0), name)


def depth(layer: int, length: int) -> float:
    """Return t of a layer within a slice: 0 for the first, 1 for the last; a slice of one layer has t = 1.

    >>> depth(0, 3), depth(2, 3), depth(0, 1)
    (0.0, 1.0, 1.0)
    """
    return layer / (length - 1) if length > 1 else 1.0
