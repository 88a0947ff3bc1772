"""Writers: tensors in any order, a slice at a time, from any thread, into files that are whole or absent.

The layout is fixed before the first byte is written, so every slice goes straight to its place and nothing is buffered;
a file that was killed half-way has a temporary name and is never taken for a finished one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Set
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.files import fsync_file, fsync_folder, storage_errors, write_behind
from soups.stores.safetensors import DTYPE_NAMES, TIED, SafetensorsStore
from soups.stores.store import TensorMeta

# Left free beside the output, so that a merge does not bring the system to a halt.
_SPARE_BYTES = 16 * 2**20
DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_PART, _UNFINISHED = ".part", ".unfinished"


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
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
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
    """Write all bytes at an offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
    write_behind(descriptor, offset, len(data))


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
        with _removed_on_error(temporary), storage_errors(self.path):
            self._shard = Shard(temporary, self.plan, metadata or {}, tied or {})

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


class FolderWriter(Writer):
    """A Hugging Face folder: one safetensors file, or several with an index, and the files that belong to a model.

    With a fingerprint, a writer that was interrupted or killed leaves its finished shards in `.NAME.FINGERPRINT.unfinished`
    beside the output; the next writer of the same fingerprint takes them as they are, and of another one removes them.

    Args:
        path: the folder to make.
        plan: every tensor to be written.
        metadata: text to text, kept in each header.
        tied: names that repeat another tensor of the plan.
        shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        files: further files, by name: bytes, or the path of a file to copy.
        overwrite: replace an existing folder as a whole.
        fingerprint: of everything that decides the tensors' bits; `None` where that is not known: nothing is kept then.

    Attributes:
        finished: names of the tensors that an earlier attempt left; they are not to be written.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Mapping[str, TensorMeta],
        *,
        metadata: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        files: Mapping[str, bytes | Path] | None = None,
        overwrite: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        path = Path(path)
        self._resumable = fingerprint is not None
        mark = fingerprint[:16] if fingerprint else uuid.uuid4().hex[:16]
        self._temporary = path.with_name(f".{path.name}.{mark}{_UNFINISHED}")
        self._parts = name_shards(plan, shard_bytes)
        self._kept = {name for name, part in self._parts.items() if is_whole(self._temporary / name, part)}
        super().__init__(
            path, plan, overwrite=overwrite, finished={key for name in self._kept for key in self._parts[name]}
        )
        self._shards: dict[str, Shard] = {}
        self._home = {key: name for name, part in self._parts.items() for key in part}
        self._number = {name: number for number, name in enumerate(self._parts)}
        self._left = {name: sum(meta.numel > 0 for meta in part.values()) for name, part in self._parts.items()}
        self._folder_lock = -1
        try:
            with storage_errors(self.path):
                self._remove_abandoned()
                self._temporary.mkdir(exist_ok=True)
                self._folder_lock = _locked(self._temporary)
                for file in self._temporary.iterdir():
                    if file.name not in self._kept:
                        shutil.rmtree(file) if file.is_dir() else file.unlink()
                for name, part in self._parts.items():
                    if name not in self._kept:
                        here = {alias: first for alias, first in (tied or {}).items() if first in part}
                        self._shards[name] = Shard(self._temporary / f"{name}{_PART}", part, metadata or {}, here)
                if len(self._parts) > 1:
                    (self._temporary / INDEX).write_text(shard_index(self._parts))
                for name, content in (files or {}).items():
                    (self._temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    if isinstance(content, bytes):
                        (self._temporary / name).write_bytes(content)
                    else:
                        shutil.copyfile(content, self._temporary / name)
        except BaseException:
            if self._folder_lock >= 0:  # else it is another process's
                self.abort()
            raise

    def _remove_abandoned(self) -> None:
        """Remove what killed attempts at this output left, if nobody writes there and it is of no use to this one."""
        for other in self.path.parent.iterdir():
            ours = other.name.startswith(f".{self.path.name}.") and other.name.endswith(_UNFINISHED)
            if ours and other != self._temporary and other.is_dir():
                try:
                    descriptor = _locked(other)
                except StorageError:
                    continue
                shutil.rmtree(other)
                os.close(descriptor)

    def part(self, name: str) -> int:
        """Return the number of the shard that a tensor is in."""
        return self._number[self._home[name]]

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        self._shards[self._home[name]].put(name, offset, data)

    def _written(self, name: str) -> None:
        shard = self._home[name]
        with self._lock:
            self._left[shard] -= 1
            last = self._left[shard] == 0
        if last and self._resumable and len(self._parts) > 1:
            self._keep(shard)

    def _keep(self, name: str) -> None:
        """Flush a shard and give it its name: from now on a killed process does not lose it."""
        shard = self._shards.pop(name)
        shard.close()
        fsync_file(shard.path)
        shard.path.replace(self._temporary / name)
        fsync_folder(self._temporary)
        self._kept.add(name)

    def _finish(self) -> None:
        for name in list(self._shards):
            self._keep(name)
        for file in self._temporary.rglob("*"):
            if file.is_file() and file.name not in self._kept:
                fsync_file(file)
        fsync_folder(self._temporary)
        if self.path.exists() and any(self.path.iterdir()):
            # The old folder steps aside whole, so that at every moment one of the two is there under some name.
            aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.old")
            self.path.rename(aside)
            try:
                self._temporary.rename(self.path)
            except OSError:
                aside.rename(self.path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            self._temporary.rename(self.path)
        fsync_folder(self.path.parent)

    def abort(self) -> None:
        """Remove the temporary folder; with a fingerprint, all but the finished shards."""
        for shard in self._shards.values():
            shard.close()
            shard.path.unlink(missing_ok=True)
        if not (self._resumable and self._kept):
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._folder_lock >= 0:
            os.close(self._folder_lock)
            self._folder_lock = -1


def _locked(folder: Path) -> int:
    """Lock a folder among processes, for as long as the descriptor that is returned stays open.

    Raises:
        StorageError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise StorageError(
                f"Another process is writing to {folder} at this moment. Wait until it has finished, or choose another output."
            ) from error
        # Some network file systems do not lock folders; two writers of one output then are the user's affair.
    return descriptor


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


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Generator[None]:
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise
