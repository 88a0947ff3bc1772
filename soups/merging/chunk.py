"""One stretch of a tensor, from every model: what a merge method computes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.merging.attached import Attached
from soups.merging.kernels import Row

Unit = Literal["element", "row", "tensor"]
"""What a chunk must not cut: nothing, a row (the last axis), or the tensor."""


class Reader(Protocol):
    """Reads one stretch of a tensor, from every model."""

    def read(self, model: int, shared: bool) -> Tensor:
        """Return model i's stretch (the base's for −1), flat, in the compute dtype.

        In memory of its own or, if told so, in memory that the next such call uses again.
        """
        ...

    def raw(self, model: int) -> Tensor:
        """Return model i's stretch, flat, in its own dtype, in memory that the next such call uses again."""
        ...

    def subtract(self, base: Tensor) -> Tensor:
        """Return all models' stretches less the base's, which it is handed, shape (models, n)."""
        ...

    def stored(self) -> list[Row] | None:
        """Return all stretches as they are stored, the base's last; `None` unless compiled loops can read them."""
        ...

    def delta(self, model: int, base: Tensor) -> Tensor:
        """Return model i's stretch less the base's, in memory that the next such call uses again."""
        ...


class Chunk:
    """One stretch of a tensor, from every model; each is read when it is first asked for.

    Args:
        key: the name of the tensor that is being made.
        start: the first element's place in the whole tensor, row-major.
        size: how many elements.
        shape: the whole tensor's shape.
        count: the number of models.
        reader: reads them.
        has_base: whether there is a base model.
        compiled: whether loops over it are compiled (`soups.merging.kernels`).
        into: the dtype that the result will be kept in; it may be returned in that already.
        deltas: the task vectors, shape (models, n), where they are there already.
        attached: the models' statistics for this tensor.
    """

    def __init__(
        self,
        key: str,
        start: int,
        size: int,
        shape: tuple[int, ...],
        count: int,
        reader: Reader,
        *,
        has_base: bool,
        compiled: bool = False,
        into: torch.dtype = torch.float32,
        deltas: Tensor | None = None,
        attached: Attached | None = None,
    ) -> None:
        self.key, self.start, self.size, self.shape, self.count = key, start, size, shape, count
        self.compiled, self.into = compiled, into
        self.attached = attached or Attached()
        self._reader, self._has_base, self._deltas = reader, has_base, deltas
        self._models: list[Tensor] | None = None
        self._base: Tensor | None = None
        self._raw: list[Row] | None = None

    def stored(self) -> tuple[list[Row], Row | None] | None:
        """Return the models and the base as they are stored, not to be overwritten; `None` unless loops are compiled for them."""
        if self._raw is None:
            self._raw = self._reader.stored()
        if self._raw is None:
            return None
        return self._raw[: self.count], self._raw[-1] if self._has_base else None

    def for_loops(self) -> tuple[Sequence[Row], Row | None]:
        """Return what compiled loops make task vectors of, not to be overwritten: see `stored`; or those, and no base."""
        found = self.stored() if self._deltas is None and self._has_base else None
        return found or (self.deltas(), None)

    def delta(self, model: int) -> Tensor:
        """Return one task vector, flat, not to be overwritten; it holds until the next is asked for."""
        if self._deltas is not None:
            return self._deltas[model]
        base = self.base
        assert base is not None
        return self._reader.delta(model, base)

    @property
    def models(self) -> list[Tensor]:
        """One flat tensor a model, in the compute dtype; the method's to overwrite, but not to keep."""
        if self._models is None:
            self._models = [self._reader.read(model, False) for model in range(self.count)]
        return self._models

    @property
    def base(self) -> Tensor | None:
        """The base model's, or `None`."""
        if self._base is None and self._has_base:
            self._base = self._reader.read(-1, False)
        return self._base

    def each(self) -> Iterator[Tensor]:
        """Yield the models one by one, in memory that is used again: a sum of many models then stays in a core's cache."""
        return (self._reader.read(model, True) for model in range(self.count))

    def each_stored(self) -> Iterator[Tensor]:
        """Yield the models one by one in their own dtypes, not to be overwritten; each holds until the next."""
        return (self._reader.raw(model) for model in range(self.count))

    def statistics(self, kind: str) -> list[Tensor]:
        """Return this stretch of a statistic of the weight's shape, one flat float64 mean a model."""
        return self.attached.stretches(kind, self.start, self.start + self.size)

    @property
    def width(self) -> int:
        """Elements in a row: the last axis of the tensor; a tensor of one axis or none is one row."""
        return self.shape[-1] if len(self.shape) > 1 else max(1, math.prod(self.shape))

    def rows(self) -> Tensor:
        """Return the task vectors θ_i − θ_0 of this stretch, shape (models, n); the method's to overwrite, but not to keep."""
        if self._deltas is not None:
            return self._deltas
        base = self.base
        if base is None:
            raise WeightsError(f"{self.key!r}: task vectors need a base model.")
        return self._reader.subtract(base)

    def deltas(self) -> list[Tensor]:
        """Return `rows` one by one, flat."""
        return list(self.rows())

    def directions(self) -> list[Tensor]:
        """Return the task vectors when there is a base model, else the models."""
        return self.deltas() if self._has_base else self.models
