"""Writers: tensors in any order, a slice at a time, from any thread, into files that are whole or absent.

The layout is fixed before the first byte is written, so every slice goes straight to its place and nothing is buffered;
a file that was killed half-way has a temporary name and is never taken for a finished one.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.files import fsync_file, fsync_folder, storage_errors
from soups.stores.safetensors import DTYPE_NAMES
from soups.stores.shards import Shard
from soups.stores.store import TensorMeta
from soups.weights import Weights, tied_names

# Left free beside the output, so that a merge does not bring the system to a halt.
_SPARE_BYTES = 16 * 2**20
DEFAULT_SHARD_BYTES = 5_000_000_000


class Writer(ABC):
    """A checkpoint being written. Use it in a `with` block: an error inside removes everything that was written.

    Args:
        path: the file or folder to make.
        plan: every tensor to be written, with its shape and dtype on disk.
        overwrite: replace what is at `path`; without it an existing output is an error, before any work.
        finished: tensors that are on disk already, from an earlier attempt.

    Raises:
        StorageError: something is at `path` already, or the disk is full, read-only or out of reach.
    """

    makes_folder = False

    def __init__(
        self,
        path: str | Path,
        plan: Mapping[str, TensorMeta],
        *,
        overwrite: bool = False,
        finished: Set[str] = frozenset(),
    ) -> None:
        self.path = Path(path)
        self.plan = dict(plan)
        self.finished = finished
        self._overwrite = overwrite
        self._missing = {name: meta.numel for name, meta in self.plan.items() if name not in finished}
        self._lock = threading.Lock()
        self._check_place()
        unsupported = [name for name, meta in self.plan.items() if meta.dtype not in DTYPE_NAMES]
        if unsupported:
            name = unsupported[0]
            raise WeightsError(
                f"Tensor {name!r} has dtype {self.plan[name].dtype}, which {self.path} cannot hold. Convert it first; "
                f"possible are {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}."
            )

    def _check_place(self) -> None:
        occupied = self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        if occupied and self.path.is_dir() != self.makes_folder:
            kind, found = ("a folder", "a file") if self.makes_folder else ("a file", "a folder")
            raise StorageError(f"{self.path} is {found}, and {kind} is to be made there. Choose another place.")
        if occupied and not self._overwrite:
            raise StorageError(
                f"There is something at {self.path} already. Choose another place, or allow overwriting (--overwrite)."
            )
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
        needed = self._space() + _SPARE_BYTES
        if free < needed:
            raise StorageError(
                f"{self.path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. Free some space or "
                f"choose another place; nothing was written."
            )

    def _space(self) -> int:
        return sum(self.plan[name].nbytes for name in self._missing)

    def part(self, name: str) -> int:
        """Return which part of the output a tensor is in; parts that are written one after another can be kept early."""
        return 0

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from `start` on of a tensor, row-major; converted to the planned dtype.

        Every element must be written exactly once, in any order, from any thread.
        """
        meta = self.plan[name]
        data = tensor.detach().reshape(-1).to("cpu", meta.dtype).contiguous()
        if data.numel():
            with storage_errors(self.path):
                self._put(name, start * meta.dtype.itemsize, data.view(torch.uint8).numpy().data)
        with self._lock:
            self._missing[name] -= data.numel()
            whole = data.numel() > 0 and self._missing[name] == 0
        if whole:
            with storage_errors(self.path):
                self._written(name)

    def _written(self, name: str) -> None:
        """Take note that a tensor is whole; called once for each that has elements, by the thread that wrote the last."""

    @abstractmethod
    def _put(self, name: str, offset: int, data: memoryview) -> None: ...

    def commit(self) -> None:
        """Flush everything to disk and give the output its name.

        Raises:
            WeightsError: a tensor of the plan was not written whole.
        """
        partial = [name for name, missing in self._missing.items() if missing]
        if partial:
            raise WeightsError(
                f"{self.path}: {len(partial)} tensors were not written whole, {partial[0]!r} among them."
            )
        with storage_errors(self.path):
            self._finish()

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()


class FileWriter(Writer):
    """One safetensors file.

    Args:
        path: the file to make.
        plan: every tensor to be written.
        metadata: text to text, kept in the file's header.
        tied: names that repeat another tensor of the plan; they take no space and are tied again when read.
        overwrite: replace an existing file.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Mapping[str, TensorMeta],
        *,
        metadata: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(path, plan, overwrite=overwrite)
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with storage_errors(self.path):
                self._shard = Shard(temporary, self.plan, metadata or {}, tied or {})
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        self._shard.put(name, offset, data)

    def _finish(self) -> None:
        self._shard.close()
        fsync_file(self._shard.path)
        self._shard.path.replace(self.path)
        fsync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove the temporary file."""
        self._shard.close()
        self._shard.path.unlink(missing_ok=True)


def write_safetensors(path: str | Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights to one safetensors file, atomically. Tied weights are stored once and are tied again when loaded.

    Raises:
        StorageError: the disk is full, read-only or out of reach; an old file at `path` is kept.
    """
    tied = tied_names(weights)
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items() if name not in tied}
    with FileWriter(path, plan, metadata=metadata, tied=tied, overwrite=True) as writer:
        for name in plan:
            writer.write_flat(name, 0, weights[name].detach().cpu().reshape(-1))
