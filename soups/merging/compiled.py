"""Loops over elements that torch needs several passes for, compiled by numba (the extra `fast`).

On flat NumPy arrays of float32 (or the bits of bfloat16), without the interpreter's lock. No operation is contracted or
reordered, so the bits are those of the torch operations in whose place they are. `soups.merging.kernels` calls them. numba
compiles a function at its first call, in a fraction of a second, and keeps the result beside this file or in the user's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload


def _bitcast_to_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _bitcast_to_bits(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _multiply_high(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


# Functions of compiled code alone: a number's bits, and the upper half of a product.
_float_of: Any = intrinsic(_bitcast_to_float)
_bits_of: Any = intrinsic(_bitcast_to_bits)
_high_product: Any = intrinsic(_multiply_high)


def _wide(number: Any) -> Any:
    raise NotImplementedError  # `_wide_of` says what it is in compiled code


@overload(_wide, inline="always")
def _wide_of(number):  # type: ignore[no-untyped-def]  # numba wants the signature of what it returns
    if number == types.uint16:  # the bits of a bfloat16 are the upper half of a float32's
        return lambda number: _float_of(np.uint32(np.uint32(number) << np.uint32(16)))
    return lambda number: number


def _compiled(function: Any) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # there is no place for a cache; every process compiles for itself
        return njit(**options)(function)


_MAGNITUDE = np.uint32(0x7FFFFFFF)
_NOTHING = np.float32(0)
_ONE = np.float32(1)
_MULTIPLIER = np.uint64(0xDA942042E4DD58B5)
_SMALLEST_DIVISOR = np.float32(1e-8)
_PIECE = 1024


@_compiled
def difference(model: Any, base: Any, out: Any) -> None:
    """out = model − base."""
    for i in range(out.size):
        out[i] = _wide(model[i]) - base[i]


# Loops start at zero, over slices, and read no scalar from an array: otherwise LLVM does not vectorise them.


@_compiled
def _shrink(source: Any, limit: Any, out: Any) -> None:
    """Copy, with zeros in the place of what is at most `limit` in magnitude; NaN stays."""
    for i in range(out.size):
        out[i] = _NOTHING if abs(source[i]) <= limit else source[i]


@_compiled
def _subtract_outliers(source: Any, limit: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] -= _NOTHING if abs(source[i]) <= limit else source[i]


@_compiled
def _absolute(source: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = abs(source[i])


@_compiled
def _drop_sign(values: Any) -> None:  # given the same array twice, `_absolute` would run element by element
    for i in range(values.size):
        values[i] = abs(values[i])


@_compiled
def _mask(out: Any, kept: Any) -> None:
    for i in range(out.size):
        out[i] *= np.float32(kept[i])


@_compiled
def _masked(source: Any, kept: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = source[i] * np.float32(kept[i])


@_compiled
def _multiply(out: Any, factor: Any, weight: Any) -> None:
    for i in range(out.size):
        out[i] = out[i] * factor * weight


@_compiled
def _divide(out: Any, divisor: Any) -> None:
    for i in range(out.size):
        out[i] /= divisor


@_compiled
def _add(out: Any, source: Any) -> None:
    for i in range(out.size):
        out[i] += source[i]


@_compiled
def _add_multiple(out: Any, source: Any, weight: Any) -> None:
    for i in range(out.size):
        out[i] += source[i] * weight


@_compiled
def _count(out: Any, source: Any) -> None:
    for i in range(out.size):
        out[i] += _NOTHING if source[i] == 0 else _ONE


@_compiled
def _decide(sign: Any, tie: Any) -> None:
    for i in range(sign.size):
        vote = sign[i]
        sign[i] = _ONE if vote > 0 else -_ONE if vote < 0 else tie


@_compiled
def _add_agreeing(total: Any, divisor: Any, tau: Any, sign: Any, weight: Any, share: Any) -> None:
    for i in range(total.size):
        agreeing = tau[i] * sign[i]
        agreeing = _NOTHING if agreeing <= 0 else agreeing  # NaN goes on into the total
        total[i] += agreeing * weight
        divisor[i] += share if agreeing > 0 else _NOTHING


@_compiled
def _sum_agreeing(total: Any, tau: Any, sign: Any, weight: Any) -> None:
    for i in range(total.size):
        agreeing = tau[i] * sign[i]
        total[i] += (_NOTHING if agreeing <= 0 else agreeing) * weight


@_compiled
def _divide_by_count(total: Any, count: Any) -> None:
    for i in range(total.size):
        total[i] /= max(count[i], _ONE)


@_compiled
def _divide_by_weight(total: Any, weight: Any) -> None:
    for i in range(total.size):
        total[i] /= _ONE if abs(weight[i]) < _SMALLEST_DIVISOR else weight[i]


@_compiled
def _scale_and_add(total: Any, factor: Any, base: Any) -> None:
    for i in range(total.size):
        total[i] = total[i] * factor + base[i]


@_compiled
def _transform(
    source: Any, limits: Any, places: Any, offset: Any, kept: Any, scale: Any, weight: Any, out: Any
) -> None:
    """Apply a `soups.merging.kernels.Choice` to a piece of a task vector, `offset` elements into its chunk, and weigh it."""
    if kept.size and limits[0] < 0 and limits[1] < 0 and limits[2] == np.inf:
        _masked(source, kept, out)
    else:
        here = min(max(places[0] - offset, 0), out.size)
        _shrink(source[:here], limits[0], out[:here])
        _shrink(source[here:], limits[1], out[here:])
        if limits[2] < np.inf:
            here = min(max(places[1] - offset, 0), out.size)
            _subtract_outliers(source[:here], limits[2], out[:here])
            _subtract_outliers(source[here:], limits[3], out[here:])
        if kept.size:
            _mask(out, kept)
    if scale[0] != _ONE:
        _divide(out, scale[0])
    if scale[1] != _ONE or weight != _ONE:
        _multiply(out, scale[1], weight)


@_compiled
def magnitudes(delta: Any, limits: Any, places: Any, kept: Any, scale: Any, before: Any, after: Any) -> None:
    """before = |delta|, after = |transformed delta|."""
    for start in range(0, delta.size, _PIECE):
        stop = min(start + _PIECE, delta.size)
        source, left = delta[start:stop], after[start:stop]
        _transform(source, limits, places, start, kept[start:stop], scale, _ONE, left)
        _absolute(source, before[start:stop])
        _drop_sign(left)


@_compiled
def task_vectors(
    deltas: Any,
    at: Any,
    base: Any,
    limits: Any,
    places: Any,
    kept: Any,
    scales: Any,
    weights: Any,
    elect: Any,
    vote: Any,
    tie: Any,
    reduce: Any,
    denominator: Any,
    factor: Any,
    work: Any,
    out: Any,
) -> None:
    """out = base + factor · reduce(consensus(transform(delta_t))).

    Args:
        deltas: shape (models, n or more), from column `at` on.
        at: where the chunk begins.
        base: shape (n,).
        limits: shape (models, 4), see `soups.merging.kernels.Choice`.
        places: shape (models, 2), int64, the same.
        kept: shape (models, n) or (models, 0).
        scales: shape (models, 2).
        weights: shape (models,).
        elect: whether signs are elected.
        vote: whether weights vote.
        tie: the sign where the sum is zero: −1, 0 or 1.
        reduce: 0: the sum; 1: divided by the weights of who agrees; 2: by how many agree, or are not zero.
        denominator: of the sum, without an election.
        factor: λ.
        work: shape (models + 2, piece).
        out: shape (n,).
    """
    models = deltas.shape[0]
    for start in range(0, base.size, work.shape[1]):
        stop = min(start + work.shape[1], base.size)
        size = stop - start
        total, divisor, sign = out[start:stop], work[models, :size], work[models + 1, :size]
        total[:] = _NOTHING
        divisor[:] = _NOTHING
        for model in range(models):
            tau, mask = work[model, :size], kept[model, start:stop]
            weight = weights[model] if elect and vote else _ONE
            source = deltas[model, at + start : at + stop]
            _transform(source, limits[model], places[model], start, mask, scales[model], weight, tau)
            if elect:
                if model:
                    _add(sign, tau)
                else:
                    sign[:] = tau
                continue
            if reduce == 2:
                _count(divisor, tau)
            if model:
                _add_multiple(total, tau, weights[model])
            else:
                total[:] = tau
                _multiply(total, weights[model], _ONE)
        if elect:
            _decide(sign, tie)
            for model in range(models):
                weight = _ONE if vote else weights[model]
                if reduce:
                    share = _ONE if reduce == 2 else weights[model]
                    _add_agreeing(total, divisor, work[model, :size], sign, weight, share)
                else:
                    _sum_agreeing(total, work[model, :size], sign, weight)
            for i in range(size):
                total[i] *= sign[i]
        if reduce == 2:
            _divide_by_count(total, divisor)
        elif reduce == 1:
            _divide_by_weight(total, divisor)
        elif denominator != _ONE:
            _divide(total, denominator)
        _scale_and_add(total, factor, base[start:stop])


@_compiled
def count_digits(values: Any, shift: Any, some: Any, prefix: Any, counts: Any) -> None:
    """Count 16 bits of each |x| from bit `shift` on; of `some` only, those whose bits above equal `prefix`."""
    if not some:
        for i in range(values.size):
            counts[(_bits_of(values[i]) & _MAGNITUDE) >> shift] += 1
        return
    for i in range(values.size):
        bits = (_bits_of(values[i]) & _MAGNITUDE) >> shift
        if bits >> np.uint32(16) == prefix:
            counts[bits & np.uint32(0xFFFF)] += 1


@_compiled
def place_of(values: Any, wanted: Any, number: Any) -> Any:
    """Return the place of the `number`-th element that equals `wanted` and how many do; the place is −1 if there are fewer."""
    found = 0
    for i in range(values.size):
        found += values[i] == wanted
    if found < number:
        return -1, found
    left = number
    for i in range(values.size):
        if values[i] == wanted:
            left -= 1
            if left == 0:
                return i, found
    return -1, found


@_compiled
def pack_places(values: Any, width: Any, out: Any) -> None:
    """Put each |x| and its place in its row of `width` into one integer; sorted, they are in order of magnitude."""
    for start in range(0, values.size, width):
        row, packed = values[start : start + width], out[start : start + width]
        for i in range(row.size):
            packed[i] = np.int64(_bits_of(row[i]) & _MAGNITUDE) << np.int64(32) | np.int64(i)


@_compiled
def unpack_places(packed: Any, table: Any, out: Any) -> None:
    """Put the table's r-th entry to where the r-th of a row of `pack_places` has its place."""
    width = table.size
    for start in range(0, packed.size, width):
        row, places = out[start : start + width], packed[start : start + width]
        for rank in range(places.size):
            row[np.uint64(places[rank]) & np.uint64(0xFFFFFFFF)] = table[rank]


@_compiled
def _permuted(high: Any, low: Any) -> Any:
    high ^= high >> np.uint64(32)
    high *= _MULTIPLIER
    high ^= high >> np.uint64(48)
    return high * (low | np.uint64(1))


@_compiled
def _next(high: Any, low: Any, step_high: Any, step_low: Any) -> Any:
    """state · multiplier + step, modulo 2¹²⁸."""
    product = low * _MULTIPLIER
    new_low = product + step_low
    carry = np.uint64(new_low < product)
    return high * _MULTIPLIER + _high_product(low, _MULTIPLIER) + step_high + carry, new_low


@_compiled
def random_words(high: Any, low: Any, step_high: Any, step_low: Any, out: Any) -> None:
    """Fill the four rows of `out` with NumPy's PCG64DXSM, each from a state of its own, given in halves.

    A number depends on the one before it; four rows at once keep the multipliers busy.
    """
    high0, high1, high2, high3 = high[0], high[1], high[2], high[3]
    low0, low1, low2, low3 = low[0], low[1], low[2], low[3]
    for i in range(out.shape[1]):
        out[0, i] = _permuted(high0, low0)
        out[1, i] = _permuted(high1, low1)
        out[2, i] = _permuted(high2, low2)
        out[3, i] = _permuted(high3, low3)
        high0, low0 = _next(high0, low0, step_high, step_low)
        high1, low1 = _next(high1, low1, step_high, step_low)
        high2, low2 = _next(high2, low2, step_high, step_low)
        high3, low3 = _next(high3, low3, step_high, step_low)
