"""Loops over elements that are worth compiling, and the switch for it.

Inside `compiling()`, what is in float32 on the CPU goes through loops in C (`_loops.c`, built where the package is installed);
otherwise, and on every other device, through torch's operations. The bits are the same, so the switch is one for the whole
process.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError, StorageError
from soups.merging.buffers import buffer
from soups.stores.sources import FileRow

try:
    import soups.merging._loops as _loops
except ModuleNotFoundError:
    _loops, _missing = None, "they were not built"
except ImportError as error:
    _loops, _missing = None, str(error)
else:
    _missing = ""

Mask = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Ones and zeros, a byte each."""
Bits = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Ones and zeros, eight to a byte, the first the lowest bit."""
Limits = np.ndarray[tuple[int], np.dtype[np.uint16]]
Row = Tensor | FileRow
"""A flat stretch of elements, in memory or in a file."""

# Of `_loops.c`; a library built from another one would misread its arguments.
_VERSION = 2
# Elements in the lanes of a sum of magnitudes; the loops' PIECE.
_PIECE = 1024
# Elements of each model that are read from files at a time: those of ten models stay in a core's second cache.
_BATCH = 1 << 15
_INFINITY = float("inf")
_STORED = (torch.bfloat16, torch.float32)


class _Switch:
    """How many merges that want compiled loops are running."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()


_switch = _Switch()


def unavailable() -> str:
    """Return why there are no compiled loops here; nothing where there are."""
    if sys.byteorder != "little":
        return "this processor's numbers are not little-endian"
    if _loops is None:
        return _missing
    return "" if _loops.VERSION == _VERSION else "they were built from another version of the package"


@contextmanager
def compiling(wanted: bool = True) -> Generator[None]:
    """Use compiled loops in here, in all threads.

    Args:
        wanted: whether to; `False` changes nothing.

    Raises:
        ConfigError: they are wanted and were not built.
    """
    if not wanted:
        yield
        return
    if reason := unavailable():
        raise ConfigError(
            f"The compiled loops cannot be used: {reason}. They are built when the package is installed where there is a C "
            f"compiler: pip install again. Without them (--no-compiled, compiled=False) results are the same, later."
        )
    with _switch.lock:
        _switch.count += 1
    try:
        yield
    finally:
        with _switch.lock:
            _switch.count -= 1


def compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether loops are compiled now, for a dtype on a device."""
    return _switch.count > 0 and dtype == torch.float32 and device.type == "cpu"


def readable(dtype: torch.dtype) -> bool:
    """Tell whether compiled loops read elements of this dtype as they are stored."""
    return dtype in _STORED


def _module() -> Any:
    """Return the compiled loops, whether they are switched on or not."""
    assert _loops is not None, _missing
    return _loops


def loops_for(*tensors: Tensor) -> Any:
    """Return the compiled loops if they are to be used for these tensors, else `None`."""
    wanted = all(compiled(one.dtype, one.device) and one.is_contiguous() for one in tensors)
    return _module() if wanted else None


def _row(row: Row) -> Any:
    """Return a flat tensor's memory (of bfloat16, its bits), or a place in a file as the loops want it."""
    if isinstance(row, FileRow):
        return row.source.descriptor, row.offset, row.dtype.itemsize
    return (row.view(torch.uint16) if row.dtype == torch.bfloat16 else row).numpy()


def _check_read(bad: int | None, rows: Sequence[Row], count: int) -> None:
    """Raise what reading says of the row that a loop could not read, if there is one."""
    if bad is None:
        return
    row = rows[bad]
    assert isinstance(row, FileRow)
    row.source.read_tensor(row.offset, row.dtype, count)
    raise StorageError(
        f"{row.source.location} could not be read for a moment. Check the disk, and start the merge again."
    )


def _result(count: int, into: torch.dtype) -> Tensor:
    return buffer("merged", torch.bfloat16 if into == torch.bfloat16 else torch.float32, count)


def _room(models: int, batch: int = _BATCH) -> Any:
    """Return the memory that loops over so many models work in."""
    size = (models + 2) * batch * 4 + (models + 2) * _PIECE * 4 + models * batch
    return buffer("room", torch.uint8, size).numpy()


# Chunks of more elements than this are rare, and get memory of their own.
LARGEST_BUFFER = 1 << 21


def absolute(values: Tensor) -> Tensor:
    """Return |x| of a chunk in memory that the next call uses again."""
    if values.device.type != "cpu" or values.numel() > LARGEST_BUFFER:
        return values.abs()
    return torch.abs(values, out=buffer("absolute", values.dtype, values.numel()))


def difference(model: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """Put model − base into `out`, and return it.

    Args:
        model: flat, of any floating dtype; widened first.
        base: flat, in the compute dtype.
        out: flat, in the compute dtype; not the same memory as `base`.
    """
    if readable(model.dtype) and model.is_contiguous() and (loops := loops_for(base, out)):
        loops.difference(_row(model), base.numpy(), out.numpy())
        return out
    return torch.sub(out.copy_(model), base, out=out)


class Draw(NamedTuple):
    """A mask of ones where a random 16-bit number is below its limit, zeros elsewhere.

    The numbers are what NumPy's PCG64DXSM draws, four to a word, the lowest bits first. NumPy draws words one after another,
    and each waits for the one before; several stretches at once take half the time.

    Attributes:
        state: the generator's state and increment, in halves, the upper first: four uint64.
        first: how many numbers to leave out.
        limits: one for all numbers or one for each.
    """

    state: np.ndarray[tuple[int], np.dtype[np.uint64]]
    first: int
    limits: Limits

    def mask(self, count: int) -> Mask:
        """Return the first numbers' mask. Only where loops are `compiled`."""
        mask = np.empty(count, np.uint8)
        _module().draw(tuple(self), mask)
        return mask


class Choice(NamedTuple):
    """What a transform does to a chunk of a task vector, for compiled loops.

    Attributes:
        limits: an element is kept if its magnitude exceeds the first, from place `places[0]` of the chunk on the second; what
            also exceeds the third, from place `places[1]` on the fourth, is set to zero after all.
        places: those places.
        mask: zeros and ones to multiply by, or how to draw them.
        divisor: what is left is divided by it, …
        factor: … then multiplied by this.
    """

    limits: tuple[float, float, float, float] = (-1.0, -1.0, _INFINITY, _INFINITY)
    places: tuple[int, int] = (0, 0)
    mask: Bits | Draw | None = None
    divisor: float = 1.0
    factor: float = 1.0


def _transforms(choices: Sequence[Choice]) -> tuple[Any, Any, Any, list[Any]]:
    return (
        np.array([choice.limits for choice in choices], np.float32),
        np.array([choice.places for choice in choices], np.int64),
        np.array([(choice.divisor, choice.factor) for choice in choices], np.float32),
        [tuple(choice.mask) if isinstance(choice.mask, Draw) else choice.mask for choice in choices],
    )


def block_sums(values: Tensor, block: int) -> Tensor:
    """Return the sum of each block of magnitudes, shape (blocks,); the last block may be shorter.

    Lane k takes the elements k, k + 1024, … of a block in order; then the upper half of the lanes is added to the lower until
    one is left. This is an order that every device can keep, and its error grows with the logarithm of the lanes.

    Args:
        values: flat, without negative numbers.
        block: elements in a block.

    >>> block_sums(torch.ones(5), 2).tolist()
    [2.0, 2.0, 1.0]
    """
    if loops_for(values):
        return block_norms([values], None, [Choice()], values.numel(), block)[0][0]
    whole = values.numel() // block * block
    parts = [_lane_sums(values[:whole].view(-1, block))] if whole else []
    if whole < values.numel():
        parts.append(_lane_sums(values[whole:].view(1, -1)))
    return torch.cat(parts) if parts else values.new_empty(0)


def _lane_sums(rows: Tensor) -> Tensor:
    lanes = rows.new_zeros(rows.shape[0], _PIECE)
    for piece in rows.split(_PIECE, 1):
        lanes[:, : piece.shape[1]] += piece
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def block_norms(
    rows: Sequence[Row], base: Row | None, choices: Sequence[Choice], count: int, block: int, kept: Sequence[Bits] = ()
) -> tuple[Tensor, Tensor]:
    """Return `block_sums` of task vectors' magnitudes before and after a transform, each of shape (models, blocks).

    Only for what is `compiled`.

    Args:
        rows: the task vectors, or models as they are stored.
        base: the base as it is stored, to be subtracted from models.
        choices: what the transform does, for each model.
        count: elements of a row.
        block: elements in a block.
        kept: where to put each model's mask, if it has one; or nowhere.
    """
    before, after = torch.empty(2, len(rows), -(-count // block), dtype=torch.float32)
    batch = block * -(-_BATCH // block)
    while batch % 8:  # masks are kept as bits
        batch += block
    bad = _module().block_norms(
        [_row(row) for row in rows],
        None if base is None else _row(base),
        _transforms(choices),
        list(kept),
        count,
        block,
        batch,
        before.numpy(),
        after.numpy(),
        _room(len(rows), batch),
    )
    _check_read(bad, rows if base is None else [*rows, base], count)
    return before, after


def one_readable_dtype(rows: Sequence[Row]) -> bool:
    """Tell whether all rows have one dtype that compiled loops read: `weighted_sum` takes no mixtures."""
    return len({row.dtype for row in rows}) == 1 and readable(rows[0].dtype)


def weighted_sum(
    models: Sequence[Row], weights: Sequence[float], count: int, *, divisor: float, into: torch.dtype
) -> Tensor:
    """Return Σ wᵢxᵢ / divisor by the rule of `soups.reduction`, in memory that the next call uses again.

    Only for what is `compiled` and of `one_readable_dtype`.

    Args:
        models: flat, as they are stored.
        weights: one for each.
        count: elements of a model.
        divisor: the sum is divided by it.
        into: the dtype to return, if that is bfloat16; otherwise it is float32.
    """
    out = _result(count, into)
    rows, room = [_row(model) for model in models], _room(len(models))
    bad = _module().weighted_sum(rows, np.array(weights, np.float64), divisor, _BATCH, room, _row(out))
    _check_read(bad, models, count)
    return out


def task_vectors(
    rows: Sequence[Row],
    base: Row,
    choices: Sequence[Choice],
    weights: Sequence[float],
    count: int,
    *,
    deltas: bool,
    vote: bool | None,
    tie: int,
    reduce: int,
    denominator: float,
    factor: float,
    into: torch.dtype,
) -> Tensor:
    """Transform, agree on signs, reduce, scale and add the base: `soups.merging.stages.TaskVectors` in one loop.

    Only for what is `compiled`.

    Args:
        rows: the models as they are stored, or their task vectors, flat.
        base: the base as it is stored, flat.
        choices: what the transform does, for each model.
        weights: one for each model.
        count: elements of a row.
        deltas: whether the rows are task vectors.
        vote: `None` for no election; else whether weights vote.
        tie: the sign where the sum of the votes is zero.
        reduce: 0: the sum; 1: divided by the weights of who agrees; 2: by how many agree, or are not zero.
        denominator: what the sum is divided by without an election.
        factor: λ.
        into: the dtype to return, if that is bfloat16; otherwise it is float32.

    Returns:
        Shape (n,), in memory that the next call uses again.
    """
    out = _result(count, into)
    bad = _module().task_vectors(
        [_row(row) for row in rows],
        _row(base),
        deltas,
        _transforms(choices),
        np.array(weights, np.float32),
        vote is not None,
        bool(vote),
        tie,
        reduce,
        denominator,
        factor,
        _BATCH,
        _room(len(rows)),
        _row(out),
    )
    _check_read(bad, [*rows, base], count)
    return out


def all_finite(values: Tensor) -> bool:
    """Tell whether no element is NaN or infinite."""
    if _switch.count and readable(values.dtype) and values.device.type == "cpu" and values.is_contiguous():
        return _module().all_finite(_row(values))
    if values.is_complex():
        return bool(torch.isfinite(values).all())
    # One cheap pass; a sum that overflows is looked at closely.
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())
