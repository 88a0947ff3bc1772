"""What may be removed from a pool, and what must not be: leftovers of killed runs, and what finished soups came from."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pydantic import ValidationError

from soups.errors import StorageError
from soups.stores.pool import Pool
from soups.stores.records import RECORD, Ingredient

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.writable-[0-9a-f]{8}")


@dataclass(frozen=True)
class Leftover:
    """Something in a pool that nothing needs.

    Attributes:
        path: on the pool's file system.
        reason: why it may go.
        size: in bytes, of all its files.
    """

    path: str
    reason: str
    size: int


def lineages(output: Path) -> dict[Path, Any]:
    """Return the lineage of every finished soup and protocol under an output folder, by folder.

    Raises:
        StorageError: a record cannot be read, so that what it needs is not known.
    """
    found: dict[Path, Any] = {}
    for name in ("report.json", "page.json"):
        for path in sorted(output.glob(f"*/*/{name}")):
            if path.parent in found or path.parent.name.startswith("."):
                continue
            try:
                found[path.parent] = json.loads(path.read_text()).get("lineage") or {}
            except (OSError, ValueError, AttributeError) as error:
                raise StorageError(
                    f"{path} cannot be read ({error}), so what it needs is not known. Mend or remove it first."
                ) from error
    return found


def needed_by(fingerprint: str, found: dict[Path, Any]) -> list[Path]:
    """Return the folders whose lineage names an ingredient."""
    return [folder for folder, lineage in found.items() if fingerprint in set(_texts(lineage))]


def leftovers(pool: Pool, output: Path | None, age: float) -> tuple[list[Leftover], list[str]]:
    """List what killed runs and removed ingredients left in a pool.

    Nothing younger than `age` is listed: a run may be writing it. What the pool's storage gives no time for is not either.

    Args:
        pool: the pool.
        output: a folder of finished soups, whose predictions are kept.
        age: in seconds.

    Returns:
        The leftovers; and why some things were left alone, as sentences.
    """
    before = time.time() - age
    found: list[Leftover] = []
    notes: list[str] = []

    def consider(path: str, reason: str) -> None:
        newest, size = _measure(pool, path)
        if newest is not None and newest < before:
            found.append(Leftover(path, reason, size))

    with pool.folder.errors("read"):
        for kind in ("", "ingredients", "starts", "predictions", "failures", "locks", "progress"):
            for path in _entries(pool, kind):
                if _TEMPORARY.fullmatch(_base(path)):
                    consider(path, "left by a killed writer")
        for kind in ("ingredients", "starts"):
            for path in _folders(pool, kind):
                if not pool.folder.files.exists(f"{path}/{RECORD}"):
                    consider(path, "half uploaded")
                    continue
                for other in _second_uploads(pool, kind, path):
                    consider(other, "upload that another machine won")
        for path in _entries(pool, "progress", ".json"):
            consider(path, "progress of a run that is gone")
        for path in _entries(pool, "failures", ".json"):
            if PurePosixPath(path).stem in pool:
                consider(path, "failure of an ingredient that was finished later")
        for path in _entries(pool, "locks", ".lock") if pool.local else []:
            with _held(path) as free:
                if free:
                    consider(path, "lock that nobody holds")
        known, unreadable = _known_weights(pool, output)
        if unreadable:
            notes.append(f"Predictions are left alone, because whose they are is not known: {'; '.join(unreadable)}")
        else:
            for path in _entries(pool, "predictions", ".safetensors"):
                if _base(path).partition("-")[0] not in known:
                    consider(path, "predictions of absent weights")
    return found, notes


def remove(pool: Pool, items: Sequence[Leftover]) -> int:
    """Remove leftovers; return how many bytes that freed.

    Raises:
        StorageError: the place cannot be written; what was not reached yet stays.
    """
    freed = 0
    for item in items:
        if item.reason == "half uploaded" and pool.folder.files.exists(f"{item.path}/{RECORD}"):
            continue  # finished meanwhile
        with pool.folder.errors():
            if item.path.endswith(".lock"):
                with _held(item.path) as free:
                    if not free:
                        continue
                    Path(item.path).unlink()
            else:
                with suppress(FileNotFoundError):  # another collection was faster
                    pool.folder.files.rm(item.path, recursive=True)
            freed += item.size
    return freed


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in cast(dict[str, Any], value).values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in cast(list[Any], value):
            yield from _texts(item)


def _known_weights(pool: Pool, output: Path | None) -> tuple[set[str], list[str]]:
    """Return the beginnings of the weights hashes that predictions may go by, and what could not be read."""
    hashes: set[str] = set()
    unreadable: list[str] = []
    try:
        hashes |= {record.weights for record in pool.starts()}
        hashes |= {record.weights for record in pool.ingredients()}
        if output is not None:
            hashes |= {text for lineage in lineages(output).values() for text in _texts(lineage)}
    except StorageError as error:
        unreadable.append(str(error))
    return {text[:24] for text in hashes}, unreadable


def _second_uploads(pool: Pool, kind: str, folder: str) -> list[str]:
    """Return weights in an ingredient's folder that its record does not name; none where that cannot be read."""
    files = _entries(pool, f"{kind}/{_base(folder)}", ".safetensors")
    if len(files) < 2:
        return []
    try:
        named = Ingredient.model_validate_json(pool.folder.files.cat_file(f"{folder}/{RECORD}")).file
    except ValidationError:
        return []
    return [path for path in files if _base(path) != named]


def _base(path: str) -> str:
    return PurePosixPath(path).name


def _list(pool: Pool, kind: str) -> list[dict[str, Any]]:
    return pool.folder.entries(kind)


def _entries(pool: Pool, kind: str, suffix: str = "") -> list[str]:
    """Return paths in a folder of the pool; with a suffix, only whole files of that kind."""
    paths = [str(entry["name"]) for entry in _list(pool, kind)]
    return [path for path in paths if path.endswith(suffix) and not (suffix and _base(path).startswith("."))]


def _folders(pool: Pool, kind: str) -> list[str]:
    entries = _list(pool, kind)
    return [str(e["name"]) for e in entries if e["type"] == "directory" and not _base(str(e["name"])).startswith(".")]


def _measure(pool: Pool, path: str) -> tuple[float | None, int]:
    """Return when anything in a path was last written (None: not known, or gone), and its bytes."""
    try:
        files = pool.folder.files.find(path, withdirs=pool.local) or [path]
        if pool.local:
            files = [*files, path]
        times = [_time(pool, file) for file in files]
        size = sum(int(pool.folder.files.size(file) or 0) for file in files if pool.folder.files.isfile(file))
    except FileNotFoundError:
        return None, 0
    known = [moment for moment in times if moment is not None]
    return (max(known) if known and len(known) == len(times) else None), size


def _time(pool: Pool, path: str) -> float | None:
    try:
        moment: datetime = pool.folder.files.modified(path)
    except (NotImplementedError, KeyError):  # this storage keeps no times
        return None
    return moment.timestamp()


@contextmanager
def _held(path: str) -> Generator[bool]:
    """Hold a lock file, and yield whether that was possible. Unlike `FileLock` this leaves the file's time as it is."""
    try:
        import fcntl
    except ImportError:  # Windows: such a file cannot be removed safely
        yield False
        return
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)  # which releases it
