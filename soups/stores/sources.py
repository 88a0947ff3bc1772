"""Bytes at an offset, from a local file or through fsspec: what every lazy reader is built on.

Local files are read with `pread` into a buffer of ours and not mapped: a file cut short while it is read is then an
error message, where a mapping would kill the process with SIGBUS, and a run's memory is what it asked for, no more.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from soups.errors import StorageError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an fsspec URL.

    >>> is_remote("s3://bucket/model.safetensors"), is_remote("C:/models"), is_remote("models/a")
    (True, False, False)
    """
    return "://" in os.fspath(path)


class ByteSource(ABC):
    """A file's bytes, read at any offset and from any thread."""

    location: str
    size: int
    identity: str
    """Text that changes when the file does: its place, its size, and when it was last changed."""
    descriptor: int | None = None
    """An open file's number, where others may read by it until `close`."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            StorageError: the file ends before that, or cannot be read.
        """

    @abstractmethod
    def open(self) -> BinaryIO:
        """Return a seekable binary file over the same bytes; the caller closes it."""

    def will_need(self, offset: int, count: int) -> None:
        """Tell the system that these bytes are read soon. A no-op where it cannot be told."""

    def close(self) -> None:
        """Release the file."""

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on."""
        buffer = bytearray(count)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_tensor(self, offset: int, dtype: torch.dtype, count: int, out: Tensor | None = None) -> Tensor:
        """Return `count` elements of `dtype` stored at `offset`, little-endian; in `out`'s memory when it is given."""
        if out is None or out.dtype != dtype or out.numel() < count:
            tensor = torch.empty(count, dtype=dtype)
        else:
            tensor = out[:count]
        if count:
            self.read_into(offset, tensor.view(torch.uint8).numpy().data)
        return tensor

    def _ended_early(self, offset: int, count: int) -> StorageError:
        return StorageError(
            f"{self.location} ends before its contents do: {count} bytes at offset {offset} were expected. It was cut off "
            f"or is being written; copy or make it again."
        )


class FileRow(NamedTuple):
    """Where elements begin in a file that has a descriptor.

    Attributes:
        source: the file.
        offset: in bytes.
        dtype: the elements'.
    """

    source: ByteSource
    offset: int
    dtype: torch.dtype


class LocalBytes(ByteSource):
    """A local file.

    Raises:
        StorageError: the file is absent, a folder, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.location = os.fspath(path)
        if not Path(path).is_file():
            raise StorageError(f"There is no file {self.location}. Check the path; was the run that makes it finished?")
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise StorageError(
                f"Cannot read {self.location}: {error.strerror}. Check the file's permissions."
            ) from error
        self._position = threading.Lock()
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        self.descriptor = self._descriptor
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.identity = f"{Path(path).resolve()}|{status.st_size}|{status.st_mtime_ns}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        done = 0
        while done < len(buffer):
            try:
                count = self._read(buffer[done:], offset + done)
            except OSError as error:
                raise StorageError(f"Cannot read {self.location}: {error.strerror}. Check the disk.") from error
            if count == 0:
                raise self._ended_early(offset, len(buffer))
            done += count

    def _read(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._position:  # Windows, macOS before 11: move to the offset, then read
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def open(self) -> BinaryIO:
        """Return the file, opened once more."""
        return Path(self.location).open("rb")

    def will_need(self, offset: int, count: int) -> None:
        """Ask the kernel to read ahead."""
        with contextlib.suppress(AttributeError, OSError):  # not on every system, and only a hint
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        self._finalizer()


class RemoteBytes(ByteSource):
    """A file behind an fsspec URL (`s3://`, `gs://`, `hf://`, `memory://` …), read by byte range.

    Raises:
        StorageError: the URL's protocol needs a package that is not installed, or there is no such file.
    """

    def __init__(self, url: str) -> None:
        self.location = url
        self._system, self._path = file_system(url)
        try:
            self.size = int(self._system.size(self._path))
            self.identity = f"{url}|{self._system.ukey(self._path)}"
        except (OSError, TypeError) as error:
            raise StorageError(f"There is no file {url}, or it cannot be read ({error}). Check the address.") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        if offset + len(buffer) > self.size:
            raise self._ended_early(offset, len(buffer))
        try:
            data = self._system.cat_file(self._path, start=offset, end=offset + len(buffer))
        except OSError as error:
            raise StorageError(f"Cannot read {self.location}: {error}. Check the connection and try again.") from error
        if len(data) != len(buffer):
            raise self._ended_early(offset, len(buffer))
        buffer[:] = data

    def open(self) -> BinaryIO:
        """Return a buffered file over the URL."""
        return cast("BinaryIO", io.BufferedReader(self._system.open(self._path, "rb")))


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        StorageError: the protocol needs a package that is not installed.
    """
    import fsspec.core

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise StorageError(f"Cannot open {url}: {error}. Install the package that its protocol needs.") from error


def open_bytes(path: str | os.PathLike[str]) -> ByteSource:
    """Open a local path or an fsspec URL for reading at offsets."""
    return RemoteBytes(os.fspath(path)) if is_remote(path) else LocalBytes(path)
