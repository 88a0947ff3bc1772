"""Safetensors files: a lazily read store that checks every number in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from soups.errors import StorageError
from soups.stores.sources import ByteSource, open_bytes
from soups.stores.store import Extent, ExtentStore, TensorMeta
from soups.stores.unreadable import recognise

# Names that repeat another tensor are left out of the file (the format stores no sharing) and listed under this key.
TIED = "soups.tied"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
# Bits of an element of dtypes that the format has and torch cannot compute with.
_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit; a longer header is a damaged length field.
_MAX_HEADER = 100_000_000
# Bytes that tell files apart.
_START = 512


class SafetensorsStore(ExtentStore):
    """One `.safetensors` file or URL, read a slice at a time.

    Raises:
        StorageError: the file is absent, truncated or not in the format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        source = open_bytes(path)
        self.location = source.location
        try:
            extents, metadata, unreadable = read_header(source)
            tied = _read_tied(source, extents, metadata)
        except BaseException:
            source.close()
            raise
        super().__init__(extents, tied, unreadable)
        self._source = source
        self.metadata = metadata

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def read_header(source: ByteSource) -> tuple[dict[str, Extent], dict[str, str], dict[str, str]]:
    """Parse and check a safetensors header.

    Returns:
        Each tensor's place, in the file's order of offsets; the file's metadata; and the dtypes of tensors that cannot be
        read, by name.

    Raises:
        StorageError: anything in the header is not as the format says, or the file is shorter or longer than it says.
    """
    start = source.read(0, min(_START, source.size))
    if source.size < 8:
        raise _damaged(source, f"it has {source.size} bytes", start)
    length = int.from_bytes(start[:8], "little")
    if (length == 0 or length > min(source.size - 8, _MAX_HEADER)) and (kind := recognise(start, source.location)):
        raise StorageError(kind)
    if length > min(source.size - 8, _MAX_HEADER):
        raise _damaged(source, f"its header would have {length} bytes, the file has {source.size}")
    try:
        header = json.loads(source.read(8, length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(source, "its header is no JSON object")
    entries = cast("dict[str, Any]", header)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", metadata).values()):
        raise _damaged(source, "its metadata is no map from text to text")
    start = 8 + length
    spans: list[tuple[int, int, str, TensorMeta | None]] = []
    unreadable: dict[str, str] = {}
    for name, entry in entries.items():
        begin, end, meta = _check_entry(source, name, entry)
        if meta is None:
            unreadable[name] = f"{entry['dtype']} {entry['shape']}"
        spans.append((begin, end, name, meta))
    spans.sort(key=lambda span: span[:3])
    expected = 0
    for begin, end, name, _ in spans:
        if begin != expected:
            raise _damaged(source, f"tensor {name!r} begins at byte {begin}, where {expected} was due")
        expected = end
    if start + expected != source.size:
        raise _damaged(source, f"its tensors need {start + expected} bytes, the file has {source.size}")
    extents = {name: Extent(source, start + begin, meta) for begin, _, name, meta in spans if meta is not None}
    return extents, cast("dict[str, str]", metadata), unreadable


def _check_entry(source: ByteSource, name: str, entry: Any) -> tuple[int, int, TensorMeta | None]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(cast("dict[str, Any]", entry)):
        raise _damaged(source, f"the header's entry for tensor {name!r} lacks a dtype, a shape or offsets")
    fields = cast("dict[str, Any]", entry)
    kind = fields["dtype"]
    if not isinstance(kind, str):
        raise _damaged(source, f"tensor {name!r} has dtype {kind!r}")
    dtype = DTYPES.get(kind)
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise _damaged(source, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    # Of a dtype that is not known the size of an element is not either; the offsets of all tensors must still join.
    bits = 8 * dtype.itemsize if dtype is not None else _PACKED.get(kind)
    for size in shape if bits is not None else ():
        bits *= size
    if offsets[1] < offsets[0] or (bits is not None and offsets[1] - offsets[0] != -(-bits // 8)):
        needed = "" if bits is None else f" needs {-(-bits // 8)} bytes,"
        raise _damaged(source, f"tensor {name!r} of shape {shape}{needed} its offsets span {offsets}")
    return offsets[0], offsets[1], None if dtype is None else TensorMeta(tuple(shape), dtype)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**62 for item in cast("list[Any]", value)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return result


def _read_tied(source: ByteSource, extents: Mapping[str, Extent], metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        tied = json.loads(metadata.get(TIED, "{}"))
        fits = isinstance(tied, dict) and all(first in extents for first in cast("dict[str, Any]", tied).values())
    except (ValueError, TypeError):
        tied, fits = {}, False
    if not fits:
        raise _damaged(source, f"its list of tied tensors ({TIED}) names tensors that are not there")
    return {name: first for name, first in cast("dict[str, str]", tied).items() if name not in extents}


def _damaged(source: ByteSource, why: str, start: bytes | None = None) -> StorageError:
    if start is not None and (kind := recognise(start, source.location)):
        return StorageError(kind)
    return StorageError(
        f"{source.location} is not a whole safetensors file: {why[:300]}. It may have been cut off while it was copied; "
        f"copy or make it again."
    )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a whole safetensors file into memory; tied names share one tensor again.

    Raises:
        StorageError: the file is absent, truncated or not in the format.
    """
    with SafetensorsStore(path) as store:
        return store.load()
