"""A folder that several processes or machines write to, with two promises: files appear whole, and some only once.

On a local (or shared) folder a file gets its name by a rename, and an exclusive one by a hard link, which fails when the name
is taken. Object stores have no rename; there one PUT makes a whole object, and `mode="create"` (S3's If-None-Match, GCS's
generation match, through fsspec) makes it only if it is new. Large files are named by their content and are referred to by a
small record that is written after them, so half an upload is never looked at.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from soups.errors import StorageError
from soups.stores.files import fsync_file, fsync_folder, replacing, storage_errors


class Place:
    """A folder or fsspec URL.

    Raises:
        StorageError: the URL's protocol needs a package that is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        try:
            self._files, root = cast(tuple[Any, str], fsspec.url_to_fs(self.url))
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"Cannot open the repository {self.url}: {error}. Install what the protocol needs (for s3:// that is `pip "
                f"install s3fs`), or name a folder."
            ) from error
        self._root = PurePosixPath(root)
        self.local = isinstance(self._files, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return a file's path or URL, as `open_store` takes it."""
        return str(self._root / name) if self.local else f"{self.url}/{name}"

    def _inside(self, name: str) -> str:
        return str(self._root / name)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        with storage_errors(self.url, "read"):
            self._files.invalidate_cache()
            return bool(self._files.exists(self._inside(name)))

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when it is not there."""
        with storage_errors(self.url, "read"):
            try:
                return int(self._files.size(self._inside(name)))
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """Return the names of the finished files in a folder, sorted."""
        with storage_errors(self.url, "read"):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._inside(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for name in (PurePosixPath(path).name for path in found) if not name.startswith("."))

    def read(self, name: str) -> bytes:
        """Return a small file's bytes.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """
        try:
            return cast(bytes, self._files.cat_file(self._inside(name)))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"Cannot read {self.path(name)}: {error}.") from error

    def put(self, name: str, file: Path) -> None:
        """Copy a local file here; it appears whole. One of that name is replaced."""
        if self.local:
            with replacing(Path(self._inside(name))) as temporary:
                file.replace(temporary) if _same_disk(file, temporary.parent) else temporary.write_bytes(
                    file.read_bytes()
                )
            return
        with storage_errors(self.url):
            self._files.makedirs(str(PurePosixPath(self._inside(name)).parent), exist_ok=True)
            self._files.put_file(str(file), self._inside(name))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file if there is none of that name; tell whether this call did. Of several callers one does.

        Raises:
            StorageError: the place is full, read-only, out of reach, or cannot create exclusively.
        """
        target = self._inside(name)
        if not self.local:
            with storage_errors(self.url):
                self._files.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
                try:
                    self._files.pipe_file(target, content, mode="create")
                except FileExistsError:
                    return False
            return True
        path = Path(target)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                fsync_file(temporary)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                fsync_folder(path.parent)
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()
        return True


def _same_disk(file: Path, folder: Path) -> bool:
    return file.stat().st_dev == folder.stat().st_dev
