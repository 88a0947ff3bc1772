"""Loops in C: `_loops.c`. Every array is a contiguous buffer; a wrong length is a `ValueError`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION: int

Stored = NDArray[Any]  # float32, or uint16: the bits of bfloat16

def difference(model: Stored, base: NDArray[np.float32], out: NDArray[np.float32], /) -> None: ...
def weighted_sum(
    models: Sequence[Any],
    weights: NDArray[np.float64],
    divisor: float,
    batch: int,
    room: NDArray[np.uint8],
    out: Stored,
    /,
) -> int | None: ...
def block_norms(
    model: Stored,
    base: Stored,
    limits: NDArray[np.float32],
    places: NDArray[np.int64],
    mask: NDArray[np.uint8],
    scale: NDArray[np.float32],
    block: int,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    /,
) -> None: ...
def task_vectors(
    models: Sequence[Stored],
    base: Stored,
    deltas: bool,
    limits: NDArray[np.float32],
    places: NDArray[np.int64],
    masks: Sequence[NDArray[np.uint8]],
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    elect: bool,
    vote: bool,
    tie: float,
    reduce: int,
    denominator: float,
    factor: float,
    out: NDArray[np.float32],
    /,
) -> None: ...
def draw(
    states: NDArray[np.uint64],
    step: NDArray[np.uint64],
    length: int,
    skip: int,
    limits: NDArray[np.uint16],
    out: NDArray[np.uint8],
    /,
) -> None: ...
def count_digits(
    values: NDArray[np.float32], shift: int, some: bool, prefix: int, counts: NDArray[np.int64], /
) -> None: ...
def place_of(values: NDArray[np.float32], wanted: float, number: int, /) -> tuple[int, int]: ...
def pack_places(values: NDArray[np.float32], width: int, out: NDArray[np.int64], /) -> None: ...
def unpack_places(packed: NDArray[np.int64], table: NDArray[np.int32], out: NDArray[np.int32], /) -> None: ...
def all_finite(values: Stored, /) -> bool: ...
