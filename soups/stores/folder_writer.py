"""Model folders, written: shards in a temporary folder beside the output, which then take their places in it."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from soups.errors import StorageError
from soups.stores.files import FolderLock, fsync_file, fsync_folder, storage_errors
from soups.stores.shards import INDEX, Shard, is_whole, name_shards, shard_index
from soups.stores.store import TensorMeta
from soups.stores.tokenizer import TOKENIZER_FILES
from soups.stores.writer import DEFAULT_SHARD_BYTES, Writer

_PART, _UNFINISHED, _ASIDE = ".part", ".unfinished", ".old"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


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
        overwrite: replace the model in an existing folder: its weights, its tokenizer, and files of the names that are
            written. Everything else in the folder stays.
        fingerprint: of everything that decides the tensors' bits; `None` where that is not known: nothing is kept then.

    Attributes:
        finished: names of the tensors that an earlier attempt left; they are not to be written.
    """

    makes_folder = True

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
        if path.name in ("", "..") or path.is_symlink():  # "." has no name, and a link must stay one
            path = path.resolve()
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
        self._folder_lock = FolderLock(self._temporary)
        try:
            with storage_errors(self.path):
                self._remove_abandoned()
                self._temporary.mkdir(exist_ok=True)
                self._folder_lock.acquire()
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
            if self._folder_lock.held:  # else it is another process's
                self.abort()
            raise

    def _remove_abandoned(self) -> None:
        """Remove what killed attempts at this output left, if nobody writes there and it is of no use to this one."""
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{16}}{re.escape(_UNFINISHED)}")
        for other in self.path.parent.iterdir():
            if ours.fullmatch(other.name) and other != self._temporary and other.is_dir():
                lock = FolderLock(other)
                try:
                    lock.acquire()
                except StorageError:
                    continue
                shutil.rmtree(other)
                lock.release()

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
        for file in _files(self._temporary):
            if file.name not in self._kept:
                fsync_file(file)
        fsync_folder(self._temporary)
        if self.path.is_dir() and any(self.path.iterdir()):
            self._replace()
        else:
            if self.path.is_dir():
                self.path.rmdir()  # Windows renames onto no folder, not even an empty one
            self._temporary.rename(self.path)
        fsync_folder(self.path.parent)

    def _replace(self) -> None:
        """Put the new model's files in the places of the old one's, and leave everything else in the folder as it is.

        The old model's files step aside first, the one that makes the folder a model before all others, and the new one's comes
        last: at no moment do old and new files pass for one model, and a killed process loses neither.
        """
        commit = INDEX if len(self._parts) > 1 else "model.safetensors"
        new = sorted(
            (file.relative_to(self._temporary) for file in _files(self._temporary)), key=lambda f: f.name == commit
        )
        aside = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}{_ASIDE}")
        aside.mkdir()
        moved: list[tuple[Path, Path]] = []
        try:
            for name in self._replaced(new):
                _move(self.path / name, aside / name, moved)
            for name in new:
                _move(self._temporary / name, self.path / name, moved)
            fsync_folder(self.path)
        except BaseException:
            for source, target in reversed(moved):
                target.replace(source)
            shutil.rmtree(aside)  # everything in it is back in its place
            raise
        shutil.rmtree(self._temporary)
        # What was replaced goes, also what an earlier attempt had put aside when it was killed.
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}{re.escape(_ASIDE)}")
        for other in self.path.parent.iterdir():
            if ours.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)

    def _replaced(self, new: list[Path]) -> list[Path]:
        """Return the files in the output that the new ones replace: of the same names, weights, and another tokenizer."""
        names = dict.fromkeys(file for file in new if (self.path / file).is_file() or (self.path / file).is_symlink())
        tokenizer = any(str(file) in TOKENIZER_FILES for file in new)
        for file in self.path.iterdir():
            if _WEIGHTS.fullmatch(file.name) or (tokenizer and file.name in TOKENIZER_FILES):
                names[Path(file.name)] = None
        # What makes the folder a model goes first.
        return sorted(names, key=lambda file: str(file) not in (INDEX, "model.safetensors"))

    def abort(self) -> None:
        """Remove the temporary folder; with a fingerprint, all but the finished shards."""
        for shard in self._shards.values():
            shard.close()
            shard.path.unlink(missing_ok=True)
        if not (self._resumable and self._kept):
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._folder_lock.release()


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    moved.append((source, target))
