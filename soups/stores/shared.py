"""A folder that several processes or machines write to, on a disk or behind an fsspec URL, with two promises.

Files appear whole: on a disk by a rename, on an object store because one PUT makes a whole object. Other remote storage may
show a large file while it is being uploaded; name such a file by its content and write a small record that refers to it
afterwards, so that nobody looks at half an upload.

`create` makes a file only if there is none of its name, and of several callers at most one does: on a disk by a hard link,
which fails when the name is taken, elsewhere by fsspec's `mode="create"` (S3's If-None-Match, GCS's generation match). Storage
that takes this request and overwrites all the same is found out by a trial. Where the promise cannot be kept, `create` raises
`NotExclusiveError` and writes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from soups.errors import SoupError, StorageError
from soups.stores.files import fsync_file, fsync_folder, replacing, storage_errors

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "oci", "oss"})
# What file systems without hard links answer.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


class NotExclusiveError(StorageError):
    """This storage cannot make a file only if there is none of its name."""


class SharedFolder:
    """A folder or fsspec URL that others write to at the same time.

    Names of files are relative to the folder, with "/" between their parts.

    Args:
        url: where it is.
        kind: what to call it in messages: "pool", "repository".

    Attributes:
        url: as it was given.
        root: the folder's path on its file system.
        local: whether it is on a disk of this machine (or mounted there).
        files: the fsspec file system.

    Raises:
        StorageError: the URL's protocol needs a package that is not installed.
    """

    def __init__(self, url: str | os.PathLike[str], kind: str = "folder") -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self._label = f"the {kind} {self.url}"
        try:
            # Others write here, so listings are never remembered.
            options = {"use_listings_cache": False} if "://" in self.url else {}
            self.files, root = cast("tuple[Any, str]", fsspec.url_to_fs(self.url, **options))
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"Cannot open {self._label}: {error}. Install what its protocol needs (for s3:// that is `pip install "
                f"'soups[s3]'`), or use a local folder."
            ) from error
        self.root = PurePosixPath(root)
        self.local = isinstance(self.files, LocalFileSystem)
        self._exclusive = self.local

    @contextmanager
    def errors(self, doing: str = "write") -> Generator[None]:
        """Within the block, what the storage raises becomes a `StorageError` that names the folder and the way out."""
        if self.local:
            with storage_errors(self._label, doing):
                yield
            return
        try:
            yield
        except SoupError:
            raise
        except Exception as error:  # each storage's library has errors of its own, and few are OSErrors
            raise StorageError(
                f"Cannot {doing} {self._label}: {type(error).__name__}: {error}. Check the address, the credentials and the "
                f"connection, then run the same command again: what was written whole is not made again."
            ) from error

    def inner(self, *parts: str) -> str:
        """Return a path on the folder's file system."""
        return str(self.root.joinpath(*parts))

    def path(self, name: str) -> str:
        """Return a file's path or URL, as `open_store` takes it."""
        return self.inner(name) if self.local else f"{self.url}/{name}"

    def exists(self, name: str = "") -> bool:
        """Tell whether there is such a file, or such a folder where the storage has folders."""
        with self.errors("read"):
            return bool(self.files.exists(self.inner(name)))

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when it is not there."""
        with self.errors("read"):
            try:
                return int(self.files.size(self.inner(name)))
            except FileNotFoundError:
                return None

    def entries(self, folder: str = "") -> list[dict[str, Any]]:
        """Return what is in a folder as fsspec describes it, sorted by name; nothing where there is no such folder."""
        with self.errors("read"):
            try:
                found = cast("list[dict[str, Any]]", self.files.ls(self.inner(folder), detail=True))
            except FileNotFoundError:
                return []
        return sorted(found, key=lambda entry: str(entry["name"]))

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the finished files and folders in a folder, sorted."""
        names = [PurePosixPath(str(entry["name"])).name for entry in self.entries(folder)]
        return [name for name in names if not name.startswith(".")]

    def read(self, name: str) -> bytes:
        """Return a small file's bytes.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """
        content: bytes | None = None
        with self.errors("read"), suppress(FileNotFoundError):
            content = cast("bytes", self.files.cat_file(self.inner(name)))
        if content is None:
            raise FileNotFoundError(self.path(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; one of that name is replaced whole."""
        with self.errors():
            if self.local:
                with replacing(Path(self.inner(name))) as temporary:
                    temporary.write_bytes(content)
            else:
                self.make(str(PurePosixPath(name).parent))
                self.files.pipe_file(self.inner(name), content)

    def put(self, name: str, file: Path) -> None:
        """Copy a file of this machine here; one of that name is replaced whole. On one disk the file is moved."""
        with self.errors():
            if not self.local:
                self.make(str(PurePosixPath(name).parent))
                self.files.put_file(os.fspath(file), self.inner(name))
                return
            with replacing(Path(self.inner(name))) as temporary:
                if file.stat().st_dev == temporary.parent.stat().st_dev:
                    file.replace(temporary)
                else:
                    shutil.copyfile(file, temporary)

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file if there is none of that name; tell whether this call did. Of several callers at most one does.

        Raises:
            NotExclusiveError: this storage cannot promise that; nothing was written.
            StorageError: the place is full, read-only or out of reach.
        """
        with self.errors():
            if self.local:
                return self._link(Path(self.inner(name)), content)
            self.make(str(PurePosixPath(name).parent))
            self._check_exclusive()
            return self._pipe_new(self.inner(name), content)

    def _link(self, path: Path, content: bytes) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_bytes(content)
            fsync_file(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise self._not_exclusive("its file system has no hard links") from error
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _pipe_new(self, path: str, content: bytes) -> bool:
        try:
            self.files.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError) as error:
            raise self._not_exclusive(f"its client says {type(error).__name__}: {error}") from error
        return True

    def _check_exclusive(self) -> None:
        """Find out by trial, once, whether the storage refuses to create a file that is there."""
        if self._exclusive:
            return
        trial = self.inner(f".exclusive-{uuid.uuid4().hex[:8]}")
        try:
            if not self._pipe_new(trial, b"1") or self._pipe_new(trial, b"2"):
                raise self._not_exclusive("it overwrites files that it was asked to create")
        finally:
            with suppress(FileNotFoundError):
                self.files.rm_file(trial)
        self._exclusive = True

    def _not_exclusive(self, why: str) -> NotExclusiveError:
        return NotExclusiveError(
            f"{self._label[:1].upper()}{self._label[1:]} cannot create a file only if it is new: {why}. Use another place: a "
            f"local disk, or S3, GCS or Azure with an fsspec client that has mode='create'."
        )

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Remove a file, or a folder with what is in it; nothing happens where it is not there."""
        with self.errors(), suppress(FileNotFoundError):
            if recursive:
                self.files.rm(self.inner(name), recursive=True)
            else:
                self.files.rm_file(self.inner(name))

    def make(self, folder: str = "") -> None:
        """Make a folder where the storage has folders."""
        # Object stores have none; asked for one, their clients would make the bucket, also a misspelt one.
        protocol = self.files.protocol
        if not _OBJECT_STORES.intersection((protocol,) if isinstance(protocol, str) else protocol):
            with self.errors():
                self.files.makedirs(self.inner(folder), exist_ok=True)

    def check_writable(self) -> None:
        """Write and remove a small file, so that a full or read-only place shows before work is spent.

        Raises:
            StorageError: naming the place and the way out.
        """
        probe = self.inner(f".writable-{uuid.uuid4().hex[:8]}")
        with self.errors():
            self.make()
            with self.files.open(probe, "wb") as file:
                file.write(b"\0" * 4096)
            self.files.rm(probe)

    @contextmanager
    def fetched(self, name: str) -> Generator[Path]:
        """Yield a path on this machine with a file's contents: the file itself, or a copy for the length of the block.

        Nothing is at the path where there is no such file.
        """
        if self.local:
            yield Path(self.inner(name))
            return
        with tempfile.TemporaryDirectory(prefix="soups-") as scratch:
            target = Path(scratch) / PurePosixPath(name).name
            with self.errors("read"):
                if self.files.exists(self.inner(name)):
                    self.files.get_file(self.inner(name), str(target))
            yield target
