"""Exact order statistics of streams: the k-th largest of numbers that are never in memory together.

The bit patterns of non-negative floats, read as integers, are in the order of the numbers. A histogram of their highest
15 bits finds the bin that the k-th largest is in, a second one of the next 16 bits inside that bin finds the number itself:
two passes for float32, four for float64, a fixed 64 Ki counters, and no sort. A tensor that fits into the room that it is
given is held, and the bit patterns are partitioned instead: one pass, the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soups.merging import ordering
from soups.merging.buffers import buffer

Stream = Callable[[], Iterable[Tensor]]
"""Gives the same chunks of non-negative floats, in the same order, each time it is called."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or an executor's: how to visit many tensors at once."""

_LOW_BITS = 16
_BINS = 1 << _LOW_BITS


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements belong to the k of largest magnitude.

    Attributes:
        threshold: the k-th largest magnitude; `None` keeps everything, infinity keeps nothing.
        last: of the elements whose magnitude equals the threshold, those up to this flat index belong, later ones do not;
            `None` when all of them do.
    """

    threshold: float | None
    last: int | None = None

    def keep_(self, values: Tensor, start: int = 0) -> Tensor:
        """Put zeros in the place of the elements that do not belong, and return the values; signs are kept.

        Args:
            values: a flat chunk of a tensor.
            start: where in the whole tensor the chunk begins.
        """
        if self.threshold is None:
            return values
        if self.threshold == float("inf"):
            return values.zero_()
        here = values.numel() if self.last is None else min(max(self.last + 1 - start, 0), values.numel())
        _shrink_(values[:here], _previous(self.threshold, values.dtype))
        _shrink_(values[here:], self.threshold)
        return values

    def limits(self, count: int, start: int) -> tuple[float, float, int]:
        """Return what `keep_` does to `count` float32 elements: they stay above one limit, from a place on above another."""
        if self.threshold is None or self.threshold == float("inf"):
            limit = -1.0 if self.threshold is None else self.threshold
            return limit, limit, 0
        here = count if self.last is None else min(max(self.last + 1 - start, 0), count)
        return _previous(self.threshold, torch.float32), self.threshold, here


def _shrink_(values: Tensor, limit: float) -> None:
    if limit >= 0 and values.numel():
        torch.ops.aten.hardshrink.out(values, limit, out=values)  # keeps |x| > limit


def _previous(value: float, dtype: torch.dtype) -> float:
    """Return the next smaller float of `dtype`, or −1 below zero."""
    if value == 0:
        return -1.0
    number = np.float32 if dtype == torch.float32 else np.float64
    return float(np.nextafter(number(value), number(0)))


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)


def _histogram(stream: Stream, shift: int, prefix: int | None) -> Tensor:
    """Count digits `bits >> shift` (16 bits wide) of the values whose higher bits equal `prefix`."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for values in stream():
        ordering.count_digits_(counts, values, shift, prefix)
    return counts


def kth_largest(streams: Sequence[Stream], ranks: Sequence[int], *, dtype: torch.dtype, map: Map = map) -> list[float]:
    """Return the k-th largest of all numbers in all streams, for each k in `ranks` (1 is the largest).

    Args:
        streams: float32 or float64 chunks without negative numbers or NaN; visited through `map`.
        ranks: each between 1 and the number of numbers.
        dtype: the chunks' dtype.
        map: how to visit the streams; results are combined by addition, so their order does not matter.

    >>> kth_largest([lambda: [torch.tensor([3.0, 1.0]), torch.tensor([2.0])]], [1, 3], dtype=torch.float32)
    [3.0, 1.0]
    """
    return [threshold for threshold, _, _ in _select(streams, ranks, dtype, map)]


def _digit(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """Return the bin of the `rank`-th largest, its rank in there, and how many are in there."""
    larger = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(larger, rank))
    digit = _BINS - 1 - place
    return digit, rank - (int(larger[place - 1]) if place else 0), int(counts[digit])


def kth_of_each(
    parts: Callable[[Any], Sequence[Tensor]],
    items: Sequence[Any],
    rank: Callable[[int], int],
    *,
    count: int,
    dtype: torch.dtype,
    map: Map = map,
) -> list[float]:
    """Return the k-th largest of several collections, when one look at an item gives a part of each of them.

    Args:
        parts: gives, for an item, one flat tensor of non-negative numbers a collection.
        items: looked at twice (four times in float64), through `map`.
        rank: k, given how many numbers a collection has.
        count: how many collections.
        dtype: of the numbers, float32 or float64.
        map: how to visit the items.

    >>> halves = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0])]
    >>> kth_of_each(lambda half: [half, half + 1], halves, lambda total: total - 1, count=2, dtype=torch.float32)
    [2.0, 3.0]
    """
    total_bits = 32 if dtype == torch.float32 else 64
    prefixes: list[int | None] = [None] * count
    ranks = [0] * count
    for shift in range(total_bits - _LOW_BITS, -1, -_LOW_BITS):

        def look(item: Any, shift: int = shift) -> list[Tensor]:
            return [
                _histogram(lambda part=part: [part], shift, prefix)
                for part, prefix in zip(parts(item), prefixes, strict=True)
            ]

        totals = [torch.zeros(_BINS, dtype=torch.int64) for _ in range(count)]
        for found in map(look, items):
            for total, counts in zip(totals, found, strict=True):
                total += counts
        for number, counts in enumerate(totals):
            wanted = ranks[number] if prefixes[number] is not None else rank(int(counts.sum()))
            digit, ranks[number], _ = _digit(counts, wanted)
            prefixes[number] = (prefixes[number] or 0) << _LOW_BITS | digit
    patterns = torch.tensor(prefixes, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    return [float(value) for value in patterns.view(dtype)]


def _select(
    streams: Sequence[Stream], ranks: Sequence[int], dtype: torch.dtype, map: Map
) -> list[tuple[float, int, int]]:
    """Return (threshold, how many equal to it are among the k largest, how many equal to it there are) for each rank."""
    total_bits = 32 if dtype == torch.float32 else 64
    state: list[tuple[int | None, int, int]] = [(None, rank, 0) for rank in ranks]
    for shift in range(total_bits - _LOW_BITS, -1, -_LOW_BITS):
        histograms: dict[int | None, Tensor] = {}
        for prefix in dict.fromkeys(prefix for prefix, _, _ in state):

            def count(stream: Stream, shift: int = shift, prefix: int | None = prefix) -> Tensor:
                return _histogram(stream, shift, prefix)

            parts = list(map(count, streams))
            histograms[prefix] = torch.stack(parts).sum(0) if parts else torch.zeros(_BINS, dtype=torch.int64)
        new: list[tuple[int | None, int, int]] = []
        for prefix, rank, _ in state:
            digit, rest, equal = _digit(histograms[prefix], rank)
            new.append(((prefix or 0) << _LOW_BITS | digit, rest, equal))
        state = new
    found: list[tuple[float, int, int]] = []
    for prefix, rank, equal in state:
        pattern = torch.tensor(prefix, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
        found.append((float(pattern.view(dtype)), rank, equal))
    return found


def cut_at(
    streams: Sequence[Stream], ranks: Sequence[int], total: int, *, dtype: torch.dtype, map: Map = map
) -> list[Cut]:
    """Return, for each k in `ranks`, the cut that keeps the k largest and everything equal to the k-th.

    Args:
        streams: magnitudes, as for `kth_largest`.
        ranks: how many to keep; 0 keeps nothing, `total` or more keeps everything.
        total: how many numbers there are.
        dtype: the chunks' dtype.
        map: how to visit the streams.
    """
    inner = [rank for rank in ranks if 0 < rank < total]
    thresholds = iter(kth_largest(streams, inner, dtype=dtype, map=map) if inner else [])
    return [Cut(float("inf")) if rank <= 0 else Cut(None) if rank >= total else Cut(next(thresholds)) for rank in ranks]


def tensor_cut(stream: Stream, ranks: Sequence[int], total: int, *, dtype: torch.dtype, room: int = 0) -> list[Cut]:
    """Return `cut_at` of one tensor, which is held if it has at most `room` elements."""
    if total > room:
        return cut_at([stream], ranks, total, dtype=dtype)
    return held_cut(_gathered(stream, total, dtype), ranks, exact=False)


def exact_cut(stream: Stream, ranks: Sequence[int], total: int, *, dtype: torch.dtype, room: int = 0) -> list[Cut]:
    """Return, for each k in `ranks`, the cut that keeps exactly k elements of one tensor.

    Among equal magnitudes the earlier elements are kept, so that the result is one and the same everywhere. A tensor of at
    most `room` elements is held.
    """
    if total <= room:
        return held_cut(_gathered(stream, total, dtype), ranks, exact=True)
    inner = [rank for rank in ranks if 0 < rank < total]
    found = iter(_select([stream], inner, dtype, map) if inner else [])
    cuts: list[Cut] = []
    for rank in ranks:
        if rank <= 0 or rank >= total:
            cuts.append(Cut(float("inf") if rank <= 0 else None))
            continue
        threshold, quota, equal = next(found)
        cuts.append(Cut(threshold, None if quota == equal else _place_of_tie(stream, threshold, quota)))
    return cuts


def held_cut(values: Tensor, ranks: Sequence[int], *, exact: bool) -> list[Cut]:
    """Return, for each k in `ranks`, the cut that keeps the k largest magnitudes of a flat tensor on the CPU.

    Args:
        values: with signs; not changed.
        ranks: how many to keep.
        exact: keep exactly k, the earlier of equal ones first, instead of everything that equals the k-th.
    """
    total = values.numel()
    if all(rank <= 0 or rank >= total for rank in ranks):
        return [Cut(float("inf") if rank <= 0 else None) for rank in ranks]
    bits = _bits(values)
    largest = torch.iinfo(bits.dtype).max  # all bits but the sign
    ordered = torch.bitwise_and(bits, largest, out=buffer("ordered", bits.dtype, total)).numpy()
    cuts: list[Cut] = []
    for rank in ranks:
        if rank <= 0 or rank >= total:
            cuts.append(Cut(float("inf") if rank <= 0 else None))
            continue
        ordered.partition(total - rank)  # one place at a time: NumPy is several times faster at that
        pattern = ordered[total - rank]
        threshold, last = float(torch.tensor(pattern).view(values.dtype)), None
        if exact:
            # What is larger stands behind its place.
            quota = rank - int(np.count_nonzero(ordered[total - rank :] > pattern))
            equal = np.flatnonzero((values.numpy() == threshold) | (values.numpy() == -threshold))
            last = None if quota == len(equal) else int(equal[quota - 1])
        cuts.append(Cut(threshold, last))
    return cuts


def _gathered(stream: Stream, total: int, dtype: torch.dtype) -> Tensor:
    values = buffer("values", dtype, total)
    start = 0
    for chunk in stream():
        values[start : start + chunk.numel()] = chunk
        start += chunk.numel()
    return values


def _place_of_tie(stream: Stream, threshold: float, number: int) -> int:
    """Return the flat index of the `number`-th element that equals `threshold`."""
    start = 0
    for values in stream():
        place, count = ordering.place_of(values, threshold, number)
        if place >= 0:
            return start + place
        number -= count
        start += values.numel()
    raise AssertionError("fewer ties than counted")
