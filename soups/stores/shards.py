"""Safetensors files of a model: their names and the tensors in each, and one of them while it is written."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from soups.errors import StorageError
from soups.stores.files import write_behind
from soups.stores.safetensors import DTYPE_NAMES, TIED, SafetensorsStore
from soups.stores.store import TensorMeta

INDEX = "model.safetensors.index.json"
# Windows would translate line ends.
_BINARY = getattr(os, "O_BINARY", 0)


class Shard:
    """One safetensors file under a temporary name: header first, then tensors at their offsets."""

    def __init__(
        self, path: Path, plan: Mapping[str, TensorMeta], metadata: Mapping[str, str], tied: Mapping[str, str]
    ) -> None:
        self.path = path
        notes = {"format": "pt", **metadata, **({TIED: json.dumps(dict(tied), sort_keys=True)} if tied else {})}
        header: dict[str, object] = {"__metadata__": notes}
        self.offsets: dict[str, int] = {}
        end = 0
        # Wide dtypes first: every tensor then starts at a multiple of its item size, as readers expect.
        for name, meta in sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize):
            self.offsets[name] = end
            span = [end, end + meta.nbytes]
            header[name] = {"dtype": DTYPE_NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": span}
            end += meta.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        self._lock = threading.Lock()
        try:
            if end:
                reserve(self._descriptor, self.start + end)
            write_at(self._descriptor, 0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.close()
            raise

    def put(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, `offset` counted from its own start."""
        with (
            self._lock
        ):  # the system writes a file's bytes one call at a time, and who waits for it in there burns a core
            write_at(self._descriptor, self.start + self.offsets[name] + offset, data)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def reserve(descriptor: int, size: int) -> None:
    """Give a file its final size, with the disk space for it where the file system can promise that."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not on every system
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all bytes at an offset. One thread at a time for each file: not every system can write at an offset in one call."""
    done = 0
    if not hasattr(os, "pwrite"):
        os.lseek(descriptor, offset, os.SEEK_SET)
    while done < len(data):
        done += _write(descriptor, data[done:], offset + done)
    write_behind(descriptor, offset, len(data))


def _write(descriptor: int, data: memoryview, offset: int) -> int:
    return os.pwrite(descriptor, data, offset) if hasattr(os, "pwrite") else os.write(descriptor, data)


def is_whole(path: Path, part: Mapping[str, TensorMeta]) -> bool:
    """Tell whether a finished shard with the planned tensors is at a path."""
    if not path.is_file():
        return False
    try:
        with SafetensorsStore(path) as store:
            return {key: store.meta(key) for key in store if key not in store.tied()} == dict(part)
    except StorageError:  # damaged: it is made again
        return False


def shard_index(parts: Mapping[str, Mapping[str, TensorMeta]]) -> str:
    """Return the text of an index of shards, given the tensors of each file."""
    weight_map = {key: name for name, part in parts.items() for key in part}
    total = sum(meta.nbytes for part in parts.values() for meta in part.values())
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def name_shards(plan: Mapping[str, TensorMeta], shard_bytes: int) -> dict[str, dict[str, TensorMeta]]:
    """Split a plan into files, by Hugging Face's names.

    >>> import torch
    >>> meta = TensorMeta((4,), torch.float32)
    >>> list(name_shards({"a": meta, "b": meta}, 100)), list(name_shards({"a": meta, "b": meta}, 16))
    (['model.safetensors'], ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'])
    """
    parts = split_shards(plan, shard_bytes)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def split_shards(plan: Mapping[str, TensorMeta], shard_bytes: int) -> list[dict[str, TensorMeta]]:
    """Split a plan into files of at most `shard_bytes`, in order; at least one file, none empty unless the plan is.

    >>> import torch
    >>> meta = TensorMeta((4,), torch.float32)
    >>> [list(part) for part in split_shards({"a": meta, "b": meta, "c": meta}, 32)]
    [['a', 'b'], ['c']]
    """
    parts: list[dict[str, TensorMeta]] = [{}]
    size = 0
    for name, meta in plan.items():
        if parts[-1] and size + meta.nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = meta
        size += meta.nbytes
    return parts
