"""Writers: tensors in any order, a slice at a time, from any thread, into files that are whole or absent.

The layout is fixed before the first byte is written, so every slice goes straight to its place and nothing is buffered;
a file that was killed half-way has a temporary name and is never taken for a finished one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.files import fsync_file, fsync_folder, storage_errors
from soups.stores.safetensors import DTYPE_NAMES, TIED
from soups.stores.store import TensorMeta

# Left free beside the output, so that a merge does not bring the system to a halt.
_SPARE_BYTES = 16 * 2**20
DEFAULT_SHARD_BYTES = 5_000_000_000


class Writer(ABC):
    """A checkpoint being written. Use it in a `with` block: an error inside removes everything that was written.

    Args:
        path: the file or folder to make.
        plan: every tensor to be written, with its shape and dtype on disk.
        overwrite: replace what is at `path`; without it an existing output is an error, before any work.

    Raises:
        StorageError: something is at `path` already, or the disk is full, read-only or out of reach.
    """

    def __init__(self, path: str | Path, plan: Mapping[str, TensorMeta], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.plan = dict(plan)
        self._overwrite = overwrite
        self._missing = {name: meta.numel for name, meta in self.plan.items()}
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
        needed = sum(meta.nbytes for meta in self.plan.values()) + _SPARE_BYTES
        if free < needed:
            raise StorageError(
                f"{self.path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. Free some space or "
                f"choose another place; nothing was written."
            )

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
        try:
            if end:
                reserve(self._descriptor, self.start + end)
            write_at(self._descriptor, 0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.close()
            raise

    def put(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, `offset` counted from its own start."""
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
        import errno

        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all bytes at an offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


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

    Args:
        path: the folder to make.
        plan: every tensor to be written.
        metadata: text to text, kept in each header.
        tied: names that repeat another tensor of the plan.
        shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        files: further files, by name: bytes, or the path of a file to copy.
        overwrite: replace an existing folder as a whole.
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
    ) -> None:
        super().__init__(path, plan, overwrite=overwrite)
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._shards: dict[str, Shard] = {}
        parts = split_shards(self.plan, shard_bytes)
        with _removed_on_error(self._temporary), storage_errors(self.path):
            self._temporary.mkdir()
            weight_map: dict[str, str] = {}
            for number, part in enumerate(parts, 1):
                name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                here = {alias: first for alias, first in (tied or {}).items() if first in part}
                shard = Shard(self._temporary / name, part, metadata or {}, here)
                self._shards |= dict.fromkeys(part, shard)
                weight_map |= dict.fromkeys(part, name)
            if len(parts) > 1:
                total = sum(meta.nbytes for meta in self.plan.values())
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                (self._temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            for name, content in (files or {}).items():
                if isinstance(content, bytes):
                    (self._temporary / name).write_bytes(content)
                else:
                    shutil.copyfile(content, self._temporary / name)

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        self._shards[name].put(name, offset, data)

    def _finish(self) -> None:
        for shard in set(self._shards.values()):
            shard.close()
        for file in self._temporary.iterdir():
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
        """Remove the temporary folder."""
        for shard in set(self._shards.values()):
            shard.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


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


def carried_files(folder: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Return the small files of a Hugging Face folder that belong to the model and not to its weights.

    Args:
        folder: where to look.
        names: the names to take; `None` takes configuration, tokenizer, generation and processor files.
    """
    endings = (".json", ".model", ".txt", ".jinja", ".tiktoken")
    weights = (".index.json", "adapter_config.json")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        wanted = file.name in names if names is not None else file.name.endswith(endings)
        if wanted and file.is_file() and not file.name.endswith(weights):
            found[file.name] = file
    return found
