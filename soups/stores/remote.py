"""Writing to fsspec URLs: shards are made on this machine one after another, and uploaded as they are finished.

Storage behind a URL takes whole files in order, so a tensor's slices meet in a file on this machine first. A folder of
several shards is valid from the moment its index is there, which is uploaded last; readers refuse numbered shards that are
not complete.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from soups.errors import StorageError
from soups.stores.safetensors import SafetensorsStore
from soups.stores.shards import INDEX, Shard, name_shards, shard_index
from soups.stores.shared import SharedFolder
from soups.stores.store import TensorMeta
from soups.stores.writer import DEFAULT_SHARD_BYTES, Writer

# In the header of each shard: which attempt it belongs to.
_MARK = "soups.fingerprint"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class RemoteFolderWriter(Writer):
    """A Hugging Face folder behind an fsspec URL.

    This machine's disk holds the shards that are being made, at most two or three; `TMPDIR` says where. A shard that is
    there with the same fingerprint is kept, so an interrupted upload goes on where it stopped.

    Args:
        url: the folder to make.
        plan: every tensor to be written.
        metadata: text to text, kept in each header.
        tied: names that repeat another tensor of the plan.
        shard_bytes: most bytes of tensors in one file.
        files: further files, by name: bytes, or the path of a file to copy.
        overwrite: replace a model that is there; its index is removed first, so that there is no moment at which old and
            new shards pass for one model.
        fingerprint: of everything that decides the tensors' bits; `None` where that is not known.

    Raises:
        StorageError: there is a model already, or the place is out of reach.
    """

    makes_folder = True

    def __init__(
        self,
        url: str,
        plan: Mapping[str, TensorMeta],
        *,
        metadata: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        files: Mapping[str, bytes | Path] | None = None,
        overwrite: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        self.folder = SharedFolder(url)
        self.url = self.folder.url
        self._fingerprint = fingerprint
        self._metadata = {**(metadata or {}), **({_MARK: fingerprint} if fingerprint else {})}
        self._tied, self._files = dict(tied or {}), dict(files or {})
        self._parts = name_shards(plan, shard_bytes)
        self._commit = INDEX if len(self._parts) > 1 else "model.safetensors"
        self._clear(overwrite)
        there = {name for name, part in self._parts.items() if len(self._parts) > 1 and self._is_there(name, part)}
        self._scratch = tempfile.TemporaryDirectory(prefix="soups-")
        # The writer's place on this machine is the scratch folder; its disk is what must have room.
        super().__init__(
            Path(self._scratch.name) / "shards", plan, finished={key for name in there for key in self._parts[name]}
        )
        self._shards: dict[str, Shard] = {}
        self._home = {key: name for name, part in self._parts.items() for key in part}
        self._number = {name: number for number, name in enumerate(self._parts)}
        self._left = {
            name: sum(meta.numel > 0 for meta in part.values())
            for name, part in self._parts.items()
            if name not in there
        }

    def _clear(self, overwrite: bool) -> None:
        self.folder.make()
        taken = [name for name in (INDEX, "model.safetensors") if self.folder.exists(name)]
        if taken and not overwrite:
            raise StorageError(
                f"There is a model at {self.url} already. Choose another place, or allow overwriting (--overwrite)."
            )
        if INDEX in taken or (taken and len(self._parts) > 1):
            for name in taken:
                self.folder.remove(name)

    def _is_there(self, name: str, part: Mapping[str, TensorMeta]) -> bool:
        if self._fingerprint is None or not self.folder.exists(name):
            return False
        try:
            with SafetensorsStore(f"{self.url}/{name}") as store:
                same = store.metadata.get(_MARK) == self._fingerprint
                return same and {key: store.meta(key) for key in store if key not in store.tied()} == dict(part)
        except StorageError:  # damaged: it is made again
            return False

    def _space(self) -> int:
        largest = max((sum(meta.nbytes for meta in part.values()) for part in self._parts.values()), default=0)
        return min(super()._space(), 3 * largest)

    def part(self, name: str) -> int:
        """Return the number of the shard that a tensor is in."""
        return self._number[self._home[name]]

    def _shard(self, name: str) -> Shard:
        with self._lock:
            if name not in self._shards:
                part = self._parts[name]
                here = {alias: first for alias, first in self._tied.items() if first in part}
                self.path.mkdir(exist_ok=True)
                self._shards[name] = Shard(self.path / name, part, self._metadata, here)
            return self._shards[name]

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        self._shard(self._home[name]).put(name, offset, data)

    def _written(self, name: str) -> None:
        shard = self._home[name]
        with self._lock:
            self._left[shard] -= 1
            last = self._left[shard] == 0
        if last and len(self._parts) > 1:
            self._upload(shard)

    def _upload(self, name: str) -> None:
        shard = self._shard(name)
        shard.close()
        self.folder.put(name, shard.path)
        shard.path.unlink()
        with self._lock:
            del self._shards[name], self._left[name]

    def _finish(self) -> None:
        for name, content in self._files.items():
            self.folder.write(name, content if isinstance(content, bytes) else content.read_bytes())
        for name in list(self._left):
            self._upload(name)
        if len(self._parts) > 1:
            self.folder.write(INDEX, shard_index(self._parts).encode())
        for name in self.folder.names():
            if _SHARD.fullmatch(name) and name not in self._parts:
                self.folder.remove(name)  # of the model that was replaced

    def abort(self) -> None:
        """Remove what is on this machine. Uploaded shards stay for the next attempt; without an index they are no model."""
        for shard in self._shards.values():
            shard.close()
        self._scratch.cleanup()


@contextmanager
def uploaded(url: str, *, overwrite: bool) -> Generator[Path]:
    """Yield a path on this machine; when the block ends without error, copy the file there to a URL, whole.

    Raises:
        StorageError: something is at the URL already, before any work; or the place is out of reach.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    folder = SharedFolder(parent)
    if folder.exists(name) and not overwrite:
        raise StorageError(
            f"There is something at {url} already. Choose another place, or allow overwriting (--overwrite)."
        )
    with tempfile.TemporaryDirectory(prefix="soups-") as scratch:
        local = Path(scratch) / name
        yield local
        folder.put(name, local)
