"""What a merge method sees of one tensor: the same stretch of every model, again and again if it likes.

A tensor is visited in chunks. Their borders are multiples of a block: `BLOCK` elements, or as many whole rows, for methods
that need those. Whoever sums over a tensor sums block by block in order; this is why no result depends on the chunk size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.merging import kernels
from soups.merging.buffers import buffer
from soups.merging.kernels import LARGEST_BUFFER, absolute
from soups.stores.store import Store

BLOCK = 16_384
"""Elements between two possible chunk borders, and in one partial sum."""

Unit = Literal["element", "row", "tensor"]


class Source(NamedTuple):
    """One tensor of one model."""

    store: Store
    key: str


class Chunk:
    """One stretch of a tensor, from every model; each is read when it is first asked for.

    Args:
        key: the name of the tensor that is being made.
        start: the first element's place in the whole tensor, row-major.
        shape: the whole tensor's shape.
        count: the number of models.
        read: gives model i's stretch (the base's for −1), flat, in the compute dtype, in memory of its own or, if told so, in
            memory that the next such call uses again.
        subtract: gives all models' stretches less the base's, which it is handed, shape (models, n).
        has_base: whether there is a base model.
        deltas: the task vectors, shape (models, n), where they are there already.
    """

    def __init__(
        self,
        key: str,
        start: int,
        shape: tuple[int, ...],
        count: int,
        read: Callable[[int, bool], Tensor],
        subtract: Callable[[Tensor], Tensor],
        *,
        has_base: bool,
        deltas: Tensor | None = None,
    ) -> None:
        self.key, self.start, self.shape = key, start, shape
        self.count, self._read, self._subtract, self._has_base = count, read, subtract, has_base
        self._deltas = deltas
        self._models: list[Tensor] | None = None
        self._base: Tensor | None = None

    @property
    def models(self) -> list[Tensor]:
        """One flat tensor a model, in the compute dtype; the method's to overwrite, but not to keep."""
        if self._models is None:
            self._models = [self._read(model, False) for model in range(self.count)]
        return self._models

    @property
    def base(self) -> Tensor | None:
        """The base model's, or `None`."""
        if self._base is None and self._has_base:
            self._base = self._read(-1, False)
        return self._base

    def each(self) -> Iterator[Tensor]:
        """Yield the models one by one, in memory that is used again: a sum of many models then stays in a core's cache."""
        return (self._read(model, True) for model in range(self.count))

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
        return self._subtract(base)

    def deltas(self) -> list[Tensor]:
        """Return `rows` one by one, flat."""
        return list(self.rows())

    def directions(self) -> list[Tensor]:
        """Return the task vectors when there is a base model, else the models."""
        return self.deltas() if self._has_base else self.models


# The system is told what comes next once in so many chunks: each hint costs a walk through its page cache.
_HINT_CHUNKS = 8


class Operands:
    """One tensor of every model, visited chunk by chunk; iterating again reads again.

    Args:
        key: the name of the tensor that is being made.
        shape: its shape, and every source's.
        models: where each model's tensor is.
        base: where the base's is, or `None`.
        unit: what a chunk must not cut: nothing, a row, or the tensor.
        chunk: most elements of one model in a chunk; rounded down to whole blocks, at least one.
        dtype: the dtype to compute in.
        device: where to compute.
        room: elements that a look at the tensor may hold, four bytes each; more must be streamed.
        holding: bytes that the tensor's task vectors may take, so that they are read and transformed once.
    """

    held = False
    """Whether the task vectors are in memory, so that what `observe` does to them stays done."""

    def __init__(
        self,
        key: str,
        shape: tuple[int, ...],
        models: Sequence[Source],
        base: Source | None,
        *,
        unit: Unit = "element",
        chunk: int = 1 << 18,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int = 0,
        holding: int = 0,
    ) -> None:
        self.key = key
        self.shape = shape
        self.models = tuple(models)
        self.base = base
        self.unit: Unit = unit
        self.dtype = dtype
        self.device = torch.device(device)
        self.room = room
        self.holding = holding
        self.numel = math.prod(shape)
        width = shape[-1] if len(shape) > 1 else max(1, self.numel)
        # Chunks are whole blocks, and who sums does so block by block: the cuts then leave no trace.
        if unit == "tensor":
            self.block = self.step = max(1, self.numel)
        else:
            self.block = max(1, width) * max(1, BLOCK // max(1, width)) if unit == "row" else BLOCK
            self.step = self.block * max(1, chunk // self.block)

    def spans(self) -> list[tuple[int, int]]:
        """Return where the chunks begin and end."""
        return [(start, min(start + self.step, self.numel)) for start in range(0, self.numel, self.step)]

    def at(self, start: int, stop: int) -> Chunk:
        """Read one chunk. Its tensors are this thread's buffers: they hold until the thread reads the next chunk."""

        def read(model: int, shared: bool) -> Tensor:
            source = self.base if model < 0 else self.models[model]
            assert source is not None
            return self._read(source, start, stop, -2 if shared else model)

        def subtract(base: Tensor) -> Tensor:
            size, count = base.numel(), len(self.models)
            small = size <= LARGEST_BUFFER and self.device.type == "cpu"
            rows = (buffer("deltas", self.dtype, count * size) if small else base.new_empty(count * size)).view(
                count, size
            )
            for source, row in zip(self.models, rows, strict=True):
                self._subtract(source, base, start, row)
            return rows

        return Chunk(self.key, start, self.shape, len(self.models), read, subtract, has_base=self.base is not None)

    def only(self, model: int) -> Operands:
        """Return the same tensor with one of the models alone."""
        return self.of((self.models[model],))

    def of(self, models: Sequence[Source]) -> Operands:
        """Return the same tensor with other models, visited the same way."""
        other = copy(self)
        other.models = tuple(models)
        return other

    @property
    def compiled(self) -> bool:
        """Whether loops over these operands are compiled (`soups.merging.kernels`)."""
        return kernels.compiled(self.dtype, self.device)

    def hold(self) -> HeldOperands | None:
        """Read the task vectors whole, if there is room for them; they hold until the thread holds another tensor's."""
        count = len(self.models)
        if self.base is None or count * self.numel * self.dtype.itemsize > self.holding:
            return None
        on_device = self.device.type != "cpu"
        held = (
            torch.empty(count, self.numel, dtype=self.dtype, device=self.device)
            if on_device
            else buffer("held", self.dtype, count * self.numel).view(count, self.numel)
        )
        for chunk in self:
            base, start = chunk.base, chunk.start
            assert base is not None
            for whole, source in zip(held, self.models, strict=True):
                self._subtract(source, base, start, whole[start : start + base.numel()])
        return HeldOperands(self, held)

    def _raw(self, source: Source, start: int, stop: int) -> Tensor:
        """Read elements as they are stored, into memory that the next such call uses again."""
        store, key = source
        small = stop - start <= LARGEST_BUFFER
        raw = store.read_flat(key, start, stop, buffer("raw", store.meta(key).dtype, stop - start) if small else None)
        if stop < self.numel and start // self.step % _HINT_CHUNKS == 0:
            store.will_need(key, stop, min(stop + _HINT_CHUNKS * self.step, self.numel))
        return raw

    def _read(self, source: Source, start: int, stop: int, slot: int) -> Tensor:
        raw = self._raw(source, start, stop)
        # A copy even where the dtype fits: weights in memory are never touched.
        if self.device.type != "cpu" or stop - start > LARGEST_BUFFER:
            return raw.to(self.device, self.dtype, copy=True)
        return buffer(slot, self.dtype, stop - start).copy_(raw)

    def _subtract(self, source: Source, base: Tensor, start: int, out: Tensor) -> Tensor:
        """Put a model's elements from `start` on, less the base's, into `out`."""
        return kernels.difference(self._raw(source, start, start + base.numel()), base, out)

    def __iter__(self) -> Iterator[Chunk]:
        for start, stop in self.spans():
            yield self.at(start, stop)


class HeldOperands(Operands):
    """A tensor whose task vectors are in memory. Chunks are views of them.

    Args:
        like: how it is visited.
        rows: the whole task vectors, shape (models, elements).
    """

    held = True

    def __init__(self, like: Operands, rows: Tensor) -> None:
        self.__dict__.update(like.__dict__)
        self.rows = rows

    def only(self, model: int) -> HeldOperands:
        """Return the same tensor with one of the models alone."""
        return HeldOperands(self.of((self.models[model],)), self.rows[model : model + 1])

    def at(self, start: int, stop: int) -> Chunk:
        """Return one chunk."""

        def read(*_: Any) -> Tensor:
            raise AssertionError(f"{self.key!r} is held as task vectors")

        rows = self.rows[:, start:stop]
        return Chunk(self.key, start, self.shape, len(self.models), read, read, has_base=True, deltas=rows)


class BlockSum:
    """A sum over a tensor that comes out the same bits however the tensor is cut at multiples of `BLOCK`.

    Each block is summed in float64 by itself; the partial sums are added without rounding error (`math.fsum`).

    Args:
        block: elements in a partial sum: `Operands.block`.

    >>> total = BlockSum(); total.add(torch.ones(BLOCK)); total.add(torch.ones(3)); total.value()
    16387.0
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._parts: list[float] = []

    def add_magnitudes(self, values: Tensor) -> None:
        """Add the absolute values of a chunk; within a block in the chunk's own dtype, which is enough for a ratio."""
        self.add(absolute(values), values.dtype)

    def add(self, values: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Add a chunk's values, a block in `dtype`; all chunks but the last have a multiple of `block` elements."""
        whole = values.numel() // self._block * self._block
        if whole:
            self._parts.extend(values[:whole].view(-1, self._block).sum(1, dtype=dtype).tolist())
        if whole < values.numel():
            self._parts.append(float(values[whole:].sum(dtype=dtype)))

    def value(self) -> float:
        """Return the sum of everything that was added."""
        return math.fsum(self._parts)
