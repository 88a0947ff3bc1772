"""What a merge method sees of one tensor: the same stretch of every model, again and again if it likes.

A tensor is visited in chunks. Their borders are multiples of a block: `BLOCK` elements, or as many whole rows, for methods
that need those. Whoever sums over a tensor sums block by block in order; this is why no result depends on the chunk size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.merging import kernels
from soups.merging.buffers import buffer
from soups.merging.kernels import LARGEST_BUFFER, Row, absolute
from soups.stores.store import Store

BLOCK = 16_384
"""Elements between two possible chunk borders, and in one partial sum."""

Unit = Literal["element", "row", "tensor"]


class Source(NamedTuple):
    """One tensor of one model."""

    store: Store
    key: str


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
    ) -> None:
        self.key, self.start, self.size, self.shape, self.count = key, start, size, shape, count
        self.compiled, self.into = compiled, into
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
        into: the dtype that the result will be kept in; the one to compute in when `None`.
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
        into: torch.dtype | None = None,
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
        self.into = into
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

        return self._chunk(start, stop, _Stretch(self, start, stop))

    def _chunk(self, start: int, stop: int, reader: Reader, deltas: Tensor | None = None) -> Chunk:
        return Chunk(
            self.key,
            start,
            stop - start,
            self.shape,
            len(self.models),
            reader,
            has_base=self.base is not None,
            compiled=self.compiled,
            into=self.into or self.dtype,
            deltas=deltas,
        )

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
                self.subtract(source, base, start, whole[start : start + base.numel()])
        return HeldOperands(self, held)

    def raw(self, source: Source, start: int, stop: int, slot: str = "raw") -> Tensor:
        """Read elements as they are stored, into memory that the next such call with this slot uses again."""
        store, key = source
        small = stop - start <= LARGEST_BUFFER
        raw = store.read_flat(key, start, stop, buffer(slot, store.meta(key).dtype, stop - start) if small else None)
        self.hint(source, start, stop)
        return raw

    def hint(self, source: Source, start: int, stop: int) -> None:
        """Tell the system what comes after a chunk."""
        if stop < self.numel and start // self.step % _HINT_CHUNKS == 0:
            source.store.will_need(source.key, stop, min(stop + _HINT_CHUNKS * self.step, self.numel))

    def subtract(self, source: Source, base: Tensor, start: int, out: Tensor) -> None:
        """Put a model's elements from `start` on, less the base's, into `out`."""
        kernels.difference(self.raw(source, start, start + base.numel()), base, out)

    def __iter__(self) -> Iterator[Chunk]:
        for start, stop in self.spans():
            yield self.at(start, stop)


class _Stretch(NamedTuple):
    """Elements `start:stop` of every model."""

    operands: Operands
    start: int
    stop: int

    def read(self, model: int, shared: bool) -> Tensor:
        whole, size = self.operands, self.stop - self.start
        source = whole.base if model < 0 else whole.models[model]
        assert source is not None
        raw = whole.raw(source, self.start, self.stop)
        # A copy even where the dtype fits: weights in memory are never touched.
        if whole.device.type != "cpu" or size > LARGEST_BUFFER:
            return raw.to(whole.device, whole.dtype, copy=True)
        return buffer(-2 if shared else model, whole.dtype, size).copy_(raw)

    def raw(self, model: int) -> Tensor:
        whole = self.operands
        return whole.raw(whole.models[model], self.start, self.stop).to(whole.device)

    def subtract(self, base: Tensor) -> Tensor:
        whole = self.operands
        size, count = base.numel(), len(whole.models)
        small = size <= LARGEST_BUFFER and whole.device.type == "cpu"
        rows = buffer("deltas", whole.dtype, count * size) if small else base.new_empty(count * size)
        rows = rows.view(count, size)
        for source, row in zip(whole.models, rows, strict=True):
            whole.subtract(source, base, self.start, row)
        return rows

    def delta(self, model: int, base: Tensor) -> Tensor:
        out = buffer("delta", base.dtype, base.numel()) if base.device.type == "cpu" else torch.empty_like(base)
        self.operands.subtract(self.operands.models[model], base, self.start, out)
        return out

    def stored(self) -> list[Row] | None:
        whole = self.operands
        sources = [*whole.models, *([whole.base] if whole.base is not None else [])]
        if not whole.compiled or not all(kernels.readable(one.store.meta(one.key).dtype) for one in sources):
            return None
        found: list[Row] = []
        for number, source in enumerate(sources):
            row = source.store.file_row(source.key, self.start)
            if row is None:
                row = whole.raw(source, self.start, self.stop, f"raw {number}")
                if not row.is_contiguous():
                    return None
            else:
                whole.hint(source, self.start, self.stop)
            found.append(row)
        return found


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

        return self._chunk(start, stop, _Held(), self.rows[:, start:stop])


class _Held(NamedTuple):
    def read(self, model: int, shared: bool) -> Tensor:
        raise AssertionError(f"the tensor is held as task vectors; model {model} is not")

    def raw(self, model: int) -> Tensor:
        raise AssertionError(f"the tensor is held as task vectors; model {model} is not")

    def subtract(self, base: Tensor) -> Tensor:
        raise AssertionError("the task vectors are there")

    def stored(self) -> list[Row] | None:
        return None

    def delta(self, model: int, base: Tensor) -> Tensor:
        raise AssertionError(f"the task vectors are there, model {model}'s too")


class BlockSum:
    """A sum over a tensor that comes out the same bits however the tensor is cut at multiples of `BLOCK`.

    Each block is summed by itself, in float64; the partial sums are added without rounding error (`math.fsum`).

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
        self.extend(kernels.block_sums(absolute(values), self._block))

    def extend(self, sums: Tensor) -> None:
        """Add the sums of a chunk's blocks."""
        self._parts.extend(sums.tolist())

    def add(self, values: Tensor) -> None:
        """Add a chunk's values; all chunks but the last have a multiple of `block` elements."""
        whole = values.numel() // self._block * self._block
        if whole:
            self.extend(values[:whole].view(-1, self._block).sum(1, dtype=torch.float64))
        if whole < values.numel():
            self._parts.append(float(values[whole:].sum(dtype=torch.float64)))

    def value(self) -> float:
        """Return the sum of everything that was added."""
        return math.fsum(self._parts)
