"""Loops over elements that are worth compiling, and the switch for it.

Inside `compiling()`, what is in float32 on the CPU goes through numba's loops (`soups.merging.compiled`); otherwise, and on
every other device, through torch's operations. The bits are the same, so the switch is one for the whole process.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.buffers import buffer

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
Mask = np.ndarray[tuple[int], np.dtype[np.uint8]]

_LOW_BITS = 16
_BINS = 1 << _LOW_BITS
_LANES = 4
_MULTIPLIER = 0xDA942042E4DD58B5  # of PCG64DXSM
# Elements of a model in a loop's working memory: with those of some ten models they stay in a core's nearest cache.
_PIECE = 1024
_INFINITY = float("inf")


class _Switch:
    """How many merges that want compiled loops are running."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()


_switch = _Switch()


def can_compile() -> bool:
    """Tell whether numba is installed, without importing it."""
    return importlib.util.find_spec("numba") is not None


@contextmanager
def compiling(wanted: bool = True) -> Generator[None]:
    """Use compiled loops in here, in all threads.

    Args:
        wanted: whether to; `False` changes nothing.

    Raises:
        ConfigError: they are wanted and numba is not installed.
    """
    if not wanted:
        yield
        return
    if not can_compile():
        raise ConfigError(
            "Compiled loops need numba: pip install 'soups[fast]'. Without it results are the same, later."
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


def _module() -> Any:
    """Return the compiled loops, whether they are switched on or not.

    Raises:
        ConfigError: numba is installed and cannot be imported, as when it does not know NumPy's version.
    """
    try:
        return importlib.import_module("soups.merging.compiled")
    except ImportError as error:
        raise ConfigError(
            f"numba is installed and cannot be imported: {error}. Install one that fits, or merge without it "
            f"(--no-compiled, compiled=False): results are the same, later."
        ) from error


def _loops(*tensors: Tensor) -> Any:
    """Return the compiled loops if they are to be used for these tensors, else `None`."""
    wanted = all(compiled(one.dtype, one.device) and one.is_contiguous() for one in tensors)
    return _module() if wanted else None


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
    if model.dtype in (torch.bfloat16, torch.float32) and (loops := _loops(base, out)):
        bits = model.view(torch.uint16) if model.dtype == torch.bfloat16 else model
        loops.difference(bits.numpy(), base.numpy(), out.numpy())
        return out
    return torch.sub(out.copy_(model), base, out=out)


class Choice(NamedTuple):
    """What a transform does to a chunk of a task vector, for compiled loops.

    Attributes:
        limits: an element is kept if its magnitude exceeds the first, from place `places[0]` of the chunk on the second; what
            also exceeds the third, from place `places[1]` on the fourth, is set to zero after all.
        places: those places.
        mask: zeros and ones to multiply by; empty for none.
        divisor: what is left is divided by it, …
        factor: … then multiplied by this.
    """

    limits: tuple[float, float, float, float] = (-1.0, -1.0, _INFINITY, _INFINITY)
    places: tuple[int, int] = (0, 0)
    mask: Mask = np.empty(0, np.uint8)
    divisor: float = 1.0
    factor: float = 1.0

    def scale(self) -> tuple[float, float]:
        """Return the divisor and the factor."""
        return self.divisor, self.factor


def magnitudes(delta: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return a task vector's magnitudes before and after a transform, in memory that the next call uses again.

    Only for what is `compiled`.
    """
    before, after = buffer("before", delta.dtype, delta.numel()), buffer("after", delta.dtype, delta.numel())
    limits, places = np.array(choice.limits, np.float32), np.array(choice.places, np.int64)
    scale = np.array(choice.scale(), np.float32)
    _module().magnitudes(delta.numpy(), limits, places, choice.mask, scale, before.numpy(), after.numpy())
    return before, after


def task_vectors(
    deltas: Tensor,
    at: int,
    base: Tensor,
    choices: Sequence[Choice],
    weights: Sequence[float],
    *,
    vote: bool | None,
    tie: int,
    reduce: int,
    denominator: float,
    factor: float,
) -> Tensor:
    """Transform, agree on signs, reduce, scale and add the base: `soups.merging.stages.TaskVectors` in one loop.

    Only for what is `compiled`.

    Args:
        deltas: task vectors, shape (models, n or more); the chunk's are those from column `at` on.
        at: that column.
        base: the base's chunk, shape (n,).
        choices: what the transform does, for each model.
        weights: one for each model.
        vote: `None` for no election; else whether weights vote.
        tie: the sign where the sum of the votes is zero.
        reduce: 0: the sum; 1: divided by the weights of who agrees; 2: by how many agree, or are not zero.
        denominator: what the sum is divided by without an election.
        factor: λ.

    Returns:
        Shape (n,), in memory that the next call uses again.
    """
    count, size = len(choices), base.numel()
    out, work = buffer("merged", base.dtype, size), buffer("work", base.dtype, (count + 2) * _PIECE)
    if any(len(choice.mask) for choice in choices):
        ones = np.ones(size, np.uint8)
        kept = np.stack([choice.mask if len(choice.mask) else ones for choice in choices])
    else:
        kept = np.empty((count, 0), np.uint8)
    _module().task_vectors(
        deltas.numpy(),
        at,
        base.numpy(),
        np.array([choice.limits for choice in choices], np.float32),
        np.array([choice.places for choice in choices], np.int64),
        kept,
        np.array([choice.scale() for choice in choices], np.float32),
        np.array(weights, np.float32),
        vote is not None,
        bool(vote),
        np.float32(tie),
        reduce,
        np.float32(denominator),
        np.float32(factor),
        work.view(count + 2, _PIECE).numpy(),
        out.numpy(),
    )
    return out


def by_rank(rows: Tensor, table: Tensor) -> Tensor:
    """Return, for each element, the entry of `table` at its rank by magnitude within its row.

    Rank 0 is the smallest; of equal ones the earlier ranks lower. Magnitudes and places are packed into one integer each:
    sorting those is ten times faster than an argsort.

    Args:
        rows: shape (rows, width).
        table: int32, shape (width,), on the CPU.

    Returns:
        int32, shape (rows, width), on the CPU; in memory that the next call uses again.

    >>> by_rank(torch.tensor([[3.0, -1.0, 2.0, 1.0]]), torch.arange(4, dtype=torch.int32)).tolist()
    [[3, 0, 2, 1]]
    """
    rows = rows.cpu()
    width, count = rows.shape[1], rows.numel()
    if rows.dtype != torch.float32:
        order = rows.abs().argsort(dim=1, stable=True)
        return torch.empty(rows.shape, dtype=table.dtype).scatter_(1, order, table.expand_as(order))
    packed = buffer("packed", torch.int64, count).view(rows.shape)
    chosen = buffer("chosen", table.dtype, count).view(rows.shape)
    loops = _loops(rows)
    if loops:
        loops.pack_places(rows.view(-1).numpy(), width, packed.view(-1).numpy())
    else:
        packed.copy_(absolute(rows.reshape(-1)).view(torch.int32).view(rows.shape))
        packed.bitwise_left_shift_(32).bitwise_or_(torch.arange(width))
    packed.numpy().sort(axis=1)
    if loops:
        loops.unpack_places(packed.view(-1).numpy(), table.numpy(), chosen.view(-1).numpy())
        return chosen
    return chosen.scatter_(1, packed.bitwise_and_(0xFFFFFFFF), table.expand_as(packed))


@lru_cache(4096)
def _leap(steps: int) -> tuple[int, int]:
    """Return a and g for which a·state + g·increment is the state after so many steps, modulo 2¹²⁸."""
    whole = 1 << 128
    a, g, power, total = 1, 0, _MULTIPLIER, 1
    while steps:
        if steps & 1:
            a, g = a * power % whole, (g * power + total) % whole
        total, power = total * (power + 1) % whole, power * power % whole
        steps >>= 1
    return a, g


def random_words(state: int, increment: int, first: int, count: int) -> Words:
    """Return what NumPy's PCG64DXSM draws from `state` on: its numbers `first` to `first + count`.

    NumPy draws them one after another, and each waits for the one before; several stretches at once take half the time.
    Only where loops are `compiled`.
    """
    length = -(-count // _LANES)
    words = np.empty((_LANES, length), np.uint64)
    states: list[int] = []
    for steps in (first, *[length] * (_LANES - 1)):
        a, g = _leap(steps)
        states.append((a * (states[-1] if states else state) + g * increment) % (1 << 128))
    high, low = (np.array(half, np.uint64) for half in zip(*(divmod(one, 1 << 64) for one in states), strict=True))
    step = [np.uint64(half) for half in divmod(increment, 1 << 64)]
    _module().random_words(high, low, *step, words)
    return words.reshape(-1)[:count]


def count_digits_(counts: Tensor, values: Tensor, shift: int, prefix: int | None) -> None:
    """Count the 16 bits from bit `shift` on in the bit patterns of magnitudes.

    Args:
        counts: of the 65,536 digits, int64, on the CPU; added to.
        values: flat, float32 or float64, without negative numbers.
        shift: 0, 16, 32 or 48.
        prefix: count only where the bits above equal this.
    """
    if loops := _loops(values):
        above = np.uint32(prefix or 0)
        loops.count_digits(values.numpy(), np.uint32(shift), prefix is not None, above, counts.numpy())
        return
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    digits = bits >> shift if shift else bits
    if prefix is None:
        counts += torch.bincount(digits, minlength=_BINS).cpu()
        return
    # Everything outside the bin falls into the first or the last counter.
    inside = (digits - ((prefix << _LOW_BITS) - 1)).clamp_(0, _BINS + 1)
    counts += torch.bincount(inside, minlength=_BINS + 2).cpu()[1 : _BINS + 1]


def place_of(values: Tensor, wanted: float, number: int) -> tuple[int, int]:
    """Return the place of the `number`-th element that equals `wanted`, −1 if there are fewer, and how many do."""
    if loops := _loops(values):
        place, count = loops.place_of(values.numpy(), np.float32(wanted), number)
        return int(place), int(count)
    equal = values == wanted
    count = int(torch.count_nonzero(equal))
    return (int(equal.nonzero().view(-1)[number - 1]) if number <= count else -1), count
