"""What a method with parts is: how a task vector becomes pieces in a file, and comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from soups.merging.operands import Operands
from soups.stores.store import Store, TensorMeta

WHOLE = "whole"
"""The piece of a tensor that is kept as the expert has it, in its own dtype."""


class Piece(NamedTuple):
    """A stretch of one piece of one tensor, to be written.

    Attributes:
        task: the number of the task; `None` for the shared part.
        name: the piece's.
        start: the first element's place in the piece.
        values: flat.
    """

    task: int | None
    name: str
    start: int
    values: Tensor


class Pieces(NamedTuple):
    """The stored pieces of one tensor, of the shared part or of one task.

    Attributes:
        store: the artifact's file.
        names: where each piece is in it.
    """

    store: Store
    names: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements `start:stop` of a piece, flat."""
        return self.store.read_flat(self.names[name], start, stop)


class PartMethod(ABC):
    """A method that makes a shared part and a part for each task. Concrete methods are frozen dataclasses.

    The base model is not stored: it is known by the hash of its weights. What comes back for a task is base + τ̂.

    Attributes:
        independent: whether each task's part depends on that task alone, so that tasks can be added and removed exactly.
    """

    independent: ClassVar[bool] = True

    @abstractmethod
    def part(self, meta: TensorMeta) -> dict[str, TensorMeta] | None:
        """Return a task's pieces of a floating tensor with shape and dtype; `None` if the tensor is kept whole."""

    def shared(self, meta: TensorMeta) -> dict[str, TensorMeta]:
        """Return the shared pieces of a floating tensor."""
        del meta
        return {}

    @abstractmethod
    def encode(self, operands: Operands) -> Iterator[Piece]:
        """Yield the pieces of one tensor, given the experts' and the base's."""

    @abstractmethod
    def decode(self, shared: Pieces, own: Pieces, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of a task vector, flat, float32."""

    def settings(self) -> dict[str, Any]:
        """Return the parameters, for the file's header."""
        return dict(vars(self))


def packed_bits(count: int) -> TensorMeta:
    """Return shape and dtype of `count` bits: eight to a byte, the first the lowest."""
    return TensorMeta((-(-count // 8),), torch.uint8)
