"""Files that are whole or absent: write under a temporary name, fsync, rename; and one error for every failing disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

from soups.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_WAY_OUT = {
    errno.ENOSPC: "the disk is full: free some space, or choose another place, and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another place, and run the same command again",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.EACCES: "permission was denied: choose another place, or change the folder's permissions",
    errno.EPERM: "permission was denied: choose another place, or change the folder's permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
    errno.EEXIST: "a file stands where a folder is needed: choose another place",
}


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], doing: str = "write") -> Generator[None]:
    """Turn an `OSError` inside the block into a `StorageError` that names `path` and the way out."""
    try:
        yield
    except OSError as error:
        reason = _WAY_OUT.get(error.errno or 0, str(error))
        raise StorageError(
            f"Cannot {doing} {os.fspath(path)}: {reason}. Nothing was lost or left half-written."
        ) from error


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut. A no-op where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)  # glibc and musl have it
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


def write_behind(descriptor: int, offset: int, count: int) -> None:
    """Ask the system to begin to write these bytes to the disk, so that less is left for fsync to wait for.

    A hint: it promises nothing, and where it cannot be given or is refused nothing happens.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, offset, count, _START_WRITING)


def fsync_file(path: Path) -> None:
    """Flush a written file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; when the block ends without error, flush it and rename it to `path`.

    A killed process leaves the old file, or the new one, never a part of it.

    Raises:
        StorageError: the disk is full, read-only or out of reach. The temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync_file(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder beside `path`; when the block ends without error, flush its files and rename it to `path`.

    If another process has put a folder at `path` meanwhile, that one stays and ours is removed: whoever writes the same
    name writes the same content.

    Raises:
        StorageError: the disk is full, read-only or out of reach. The temporary folder is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_file(file)
            fsync_folder(temporary)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            fsync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class FolderLock:
    """A lock on a folder among processes, which a process that ends lets go.

    Where folders cannot be locked (Windows) a file of the folder's name and the ending `.lock` beside it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self._file: Any = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0 or self._file is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StorageError: another process holds it.
        """
        if fcntl is None:
            self._acquire_file()
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise self._taken() from error
            # Some network file systems do not lock folders; two writers of one output then are the user's affair.
        self._descriptor = descriptor

    def _acquire_file(self) -> None:
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder.with_name(f"{self._folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise self._taken() from error
        self._file = lock

    def _taken(self) -> StorageError:
        return StorageError(
            f"Another process is writing to {self._folder} at this moment. Wait until it has finished, or choose another "
            f"output."
        )

    def release(self) -> None:
        """Let the lock go; nothing happens where it is not held."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._file is not None:
            self._file.release()
            Path(self._file.lock_file).unlink(missing_ok=True)
            self._file = None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; independent of the order of keys.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
