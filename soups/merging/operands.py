"""`Operands`: one tensor of every model, read chunk by chunk, as often as a merge method needs.

Chunk borders are multiples of a block. A block has `BLOCK` elements, or about as many in whole rows if a method needs whole rows.
Sums over a tensor are added block by block, in order (`soups.merging.sums`). No result depends on the chunk size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from soups.merging import kernels
from soups.merging.attached import Attached, Statistic
from soups.merging.buffers import buffer
from soups.merging.chunk import Chunk, Reader, Unit
from soups.merging.kernels import LARGEST_BUFFER, Row
from soups.merging.sums import BLOCK
from soups.stores.store import Store


class Source(NamedTuple):
    """One tensor of one model."""

    store: Store
    key: str


# The system is told what comes next once in so many chunks: each hint costs a walk through its page cache.
_HINT_CHUNKS = 8


class Operands:
    """One tensor of every model, read chunk by chunk. Each iteration reads it again.

    Args:
        key: the name of the output tensor.
        shape: the shape of the output and of every source.
        models: each model's source of the tensor.
        base: the base model's source, or `None`.
        unit: the part that a chunk never splits: an element, a row, or the tensor.
        chunk: the most elements of one model in a chunk; rounded down to whole blocks, at least one.
        dtype: the dtype to compute in.
        device: the device to compute on.
        room: the most elements that `observe` may hold, four bytes each; larger tensors must be streamed.
        holding: the most bytes of the tensor's task vectors to hold in memory, so that they are read and transformed once.
        into: the dtype of the output; `None`: the dtype to compute in.
        statistics: the models' statistics for this tensor, by kind.
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
        statistics: Mapping[str, tuple[Statistic, ...]] | None = None,
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
        self.attached = Attached(statistics or {}, self.device)
        self.numel = math.prod(shape)
        width = shape[-1] if len(shape) > 1 else max(1, self.numel)
        # Chunks are whole blocks, and who sums does so block by block: the cuts then leave no trace.
        if unit == "tensor":
            self.block = self.step = max(1, self.numel)
        else:
            self.block = max(1, width) * max(1, BLOCK // max(1, width)) if unit == "row" else BLOCK
            self.step = self.block * max(1, chunk // self.block)

    def spans(self) -> list[tuple[int, int]]:
        """Return the start and stop of each chunk."""
        return [(start, min(start + self.step, self.numel)) for start in range(0, self.numel, self.step)]

    def at(self, start: int, stop: int) -> Chunk:
        """Read one chunk. Its tensors are this thread's buffers, valid until the thread reads the next chunk."""

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
            attached=self.attached,
        )

    def only(self, model: int) -> Operands:
        """Return operands with the same tensor of one model only."""
        other = copy(self)
        other.models, other.attached = (self.models[model],), self.attached.only(model)
        return other

    @property
    def compiled(self) -> bool:
        """Whether loops over these operands are compiled (`soups.merging.kernels`)."""
        return kernels.compiled(self.dtype, self.device)

    def hold(self) -> HeldOperands | None:
        """Read the whole task vectors, if `holding` allows; they are valid until the thread holds another tensor's."""
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
        """Read elements as they are stored, into memory that the next call with this slot reuses."""
        store, key = source
        small = stop - start <= LARGEST_BUFFER
        raw = store.read_flat(key, start, stop, buffer(slot, store.meta(key).dtype, stop - start) if small else None)
        self.hint(source, start, stop)
        return raw

    def hint(self, source: Source, start: int, stop: int) -> None:
        """Announce the read of the next chunk to the stores."""
        if stop < self.numel and start // self.step % _HINT_CHUNKS == 0:
            source.store.will_need(source.key, stop, min(stop + _HINT_CHUNKS * self.step, self.numel))

    def subtract(self, source: Source, base: Tensor, start: int, out: Tensor) -> None:
        """Write a model's elements from `start` on, minus the base model's, into `out`."""
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
    """A tensor whose task vectors are in memory. Its chunks are views of them.

    Args:
        like: the operands with the same tensor and chunks.
        rows: the whole task vectors, shape (models, elements).
    """

    held = True

    def __init__(self, like: Operands, rows: Tensor) -> None:
        self.__dict__.update(like.__dict__)
        self.rows = rows

    def only(self, model: int) -> HeldOperands:
        """Return operands with the same tensor of one model only."""
        return HeldOperands(Operands.only(self, model), self.rows[model : model + 1])

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
