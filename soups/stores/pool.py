"""The pool: a folder or fsspec URL of finished fine-tunes, the ingredients of soups.

Each ingredient has a folder, named by its fingerprint::

    pool/
      ingredients/<fingerprint>/weights.safetensors, record.json
      starts/<fingerprint>/…                    the base models and their linear probes
      predictions/<weights hash>-<split hash>.safetensors   logits, computed once
      failures/<fingerprint>.json               why a run failed; removed when it succeeds

On a local disk a rename puts the whole folder in place, so an ingredient is either whole or absent.

Object stores (s3://) have neither renames nor locks. There the weights are uploaded first, under a name with their hash.
`record.json` follows; it names the weights file and is one object, so it is either whole or absent. If two machines make the
same ingredient at once with different bits, their files cannot mix. Stores with exclusive creation (AWS S3 and compatible
ones) keep the first record; other stores keep the last. Without locks, some work may be done twice.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.files import fsync_folder, replacing_folder, sha256_file, write_json
from soups.stores.records import RECORD as RECORD
from soups.stores.records import WEIGHTS as WEIGHTS
from soups.stores.records import Failure as Failure
from soups.stores.records import Ingredient as Ingredient
from soups.stores.safetensors import SafetensorsStore, read_safetensors
from soups.stores.shared import NotExclusiveError, SharedFolder
from soups.stores.store import Store
from soups.stores.writer import write_safetensors
from soups.weights import Weights, check_finite, hash_architecture, hash_weights


class Pool:
    """Ingredients at a path or an fsspec URL (`s3://bucket/pool`, `memory://pool`).

    Attributes:
        folder: the pool's `SharedFolder`.
        url: its path or URL.
        local: whether it is on a disk of this machine.

    Raises:
        StorageError: the pool cannot be reached.
    """

    def __init__(self, url: str | Path) -> None:
        self.folder = SharedFolder(url, "pool")
        self.url, self.local = str(url), self.folder.local

    def __contains__(self, fingerprint: str) -> bool:
        return self._exists("ingredients", fingerprint, RECORD)

    def check_writable(self) -> None:
        """Write and remove a small file, to detect a full or read-only pool before any training.

        Raises:
            StorageError: the pool cannot be written.
        """
        self.folder.check_writable()

    def ingredients(self) -> list[Ingredient]:
        """Return the records of all finished ingredients, in the order of their fingerprints."""
        return [self.ingredient(name) for name in self._names("ingredients")]

    def names(self) -> list[str]:
        """Return the fingerprints of all finished ingredients, without reading their records."""
        return self._names("ingredients")

    def starts(self) -> list[Ingredient]:
        """Return the records of all base models and their linear probes."""
        return [self._record("starts", name) for name in self._names("starts")]

    def find(self, beginning: str) -> str:
        """Return the only fingerprint that begins with the given characters.

        Raises:
            StorageError: there is none, or more than one.
        """
        names = self.names()
        found = [name for name in names if name.startswith(beginning)]
        if len(found) == 1 and beginning:
            return found[0]
        known = ", ".join(name[:8] for name in (found or names)[:8]) or "none"
        problem = "fits more than one ingredient" if found else "is no ingredient"
        raise StorageError(f"{beginning!r} {problem} of the pool {self.url}: {known}.")

    def ingredient(self, fingerprint: str) -> Ingredient:
        """Return the record of an ingredient.

        Raises:
            StorageError: there is none, or its record cannot be read.
        """
        return self._record("ingredients", fingerprint)

    def weights(self, fingerprint: str, verify: bool = False) -> dict[str, Tensor]:
        """Read an ingredient's weights, checked against its record: size, names, shapes, dtypes and finiteness.

        Args:
            fingerprint: the ingredient.
            verify: also compare the hash of all bytes; this takes longer than the read.

        Raises:
            StorageError: the file is absent or truncated; with `verify`, altered.
            WeightsError: a tensor holds NaN or infinity, or names or shapes differ from the record.
        """
        return self._weights("ingredients", self.ingredient(fingerprint), verify)

    def store(self, fingerprint: str) -> Store:
        """Open an ingredient's weights for reading one tensor at a time; the caller closes it.

        Raises:
            StorageError: the file is absent, truncated or damaged.
        """
        path = self._path("ingredients", fingerprint, self.ingredient(fingerprint).file)
        return SafetensorsStore(path if self.local else self.folder.files.unstrip_protocol(path))

    def weights_file(self, fingerprint: str) -> Path | None:
        """Return the path of an ingredient's weights, for partial reads; None if the pool is not local.

        Raises:
            StorageError: the file is absent or has another size than its record says.
        """
        return (
            Path(self._path("ingredients", fingerprint, WEIGHTS)) if self._sized("ingredients", fingerprint) else None
        )

    def start_file(self, weights_hash: str) -> Path | None:
        """Return the path of a base model's weights, by their hash; None if the pool lacks it or is not local."""
        for record in self.starts() if self.local else []:
            if record.weights == weights_hash and self._sized("starts", record.fingerprint):
                return Path(self._path("starts", record.fingerprint, WEIGHTS))
        return None

    def add(self, record: Ingredient, weights: Weights) -> Ingredient:
        """Add a finished ingredient, and fill in the fields that describe its weights. An existing ingredient is kept.

        Raises:
            WeightsError: the weights hold NaN or infinity.
            StorageError: the place is full, read-only or out of reach; nothing half-written is left behind.
        """
        added = self._add("ingredients", record, weights)
        self.folder.remove(f"failures/{record.fingerprint}.json")
        return added

    def remove(self, fingerprint: str) -> None:
        """Remove a finished ingredient. After a crash it is either whole or invisible to readers.

        Raises:
            StorageError: there is none, or the pool cannot be written.
        """
        if fingerprint not in self:
            self._record("ingredients", fingerprint)  # tells which there are
        folder = self._path("ingredients", fingerprint)
        with self.folder.errors():
            if self.local:
                hidden = Path(folder).with_name(f".{fingerprint}.{uuid.uuid4().hex[:8]}.tmp")
                Path(folder).rename(hidden)
                fsync_folder(hidden.parent)
                shutil.rmtree(hidden)
            else:
                self.folder.files.rm(f"{folder}/{RECORD}")  # without it the ingredient is not there
                self.folder.files.rm(folder, recursive=True)

    def start(self, fingerprint: str) -> tuple[Ingredient, dict[str, Tensor]] | None:
        """Return a base model by its fingerprint, or None."""
        if not self._exists("starts", fingerprint, RECORD):
            return None
        record = self._record("starts", fingerprint)
        return record, self._weights("starts", record)

    def start_record(self, fingerprint: str) -> Ingredient | None:
        """Return the record of a base model, without reading its weights, or None."""
        return self._record("starts", fingerprint) if self._exists("starts", fingerprint, RECORD) else None

    def add_start(self, record: Ingredient, weights: Weights) -> Ingredient:
        """Add a base model; see `add`."""
        return self._add("starts", record, weights)

    @contextmanager
    def lock(self, name: str) -> Generator[None]:
        """Hold a lock among the processes of one machine, so that only one of them does the work.

        On object stores this has no effect: several processes may do the work, and one result is kept.
        """
        if not self.local:
            yield
            return
        from filelock import FileLock

        with self.folder.errors():
            folder = Path(self._path("locks"))
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{name}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def fail(self, failure: Failure) -> None:
        """Record the error of a failed run."""
        self.folder.write(f"failures/{failure.fingerprint}.json", failure.model_dump_json(indent=2).encode() + b"\n")

    def failure(self, fingerprint: str) -> Failure | None:
        """Return the error of the ingredient's last run, or None."""
        if fingerprint in self or not self._exists("failures", f"{fingerprint}.json"):
            return None
        return Failure.model_validate_json(self.folder.read(f"failures/{fingerprint}.json"))

    def report_progress(self, name: str, done: dict[str, int]) -> None:
        """Record the progress of an ingredient's run, for displays on any machine. The file is overwritten often and not flushed.

        Raises:
            StorageError: the pool cannot be written.
        """
        path = self._path("progress", f"{name}.json")
        with self.folder.errors():
            if self.local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(json.dumps(done))
            else:
                self.folder.files.pipe_file(path, json.dumps(done).encode())

    def progress(self, name: str) -> dict[str, int] | None:
        """Return the progress of an ingredient's run, or None if none is recorded."""
        try:
            return json.loads(self.folder.read(f"progress/{name}.json"))
        except (FileNotFoundError, json.JSONDecodeError):  # not begun, or just being written
            return None

    def forget_progress(self, name: str) -> None:
        """Remove the file of `report_progress`."""
        self.folder.remove(f"progress/{name}.json")

    def failures(self) -> list[Failure]:
        """Return the errors of failed runs without a finished ingredient, in the order of their fingerprints."""
        names = self.folder.names("failures")
        whole = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return [failure for name in whole if (failure := self.failure(name))]

    def predictions(self, weights_hash: str, split_hash: str) -> Tensor | None:
        """Return the stored logits, float32 (N, classes), of these weights on a split, or None."""
        name = _predictions(weights_hash, split_hash)
        if not self._exists(name):
            return None
        with self.folder.fetched(name) as local:
            try:
                return read_safetensors(local)["logits"]
            except StorageError:  # cut off by a crash of the machine: worth a recomputation, not an error
                return None

    def add_predictions(self, weights_hash: str, split_hash: str, logits: Tensor) -> None:
        """Store the logits of these weights on a split."""
        name = _predictions(weights_hash, split_hash)
        with self.folder.errors(), tempfile.TemporaryDirectory() as scratch:
            file = Path(self.folder.inner(name)) if self.local else Path(scratch) / "logits"
            write_safetensors(file, {"logits": logits})
            if not self.local:
                self.folder.put(name, file)

    def _add(self, kind: str, record: Ingredient, weights: Weights) -> Ingredient:
        where = f"ingredient {record.short}"
        check_finite(weights, where=where)
        record = record.model_copy(
            update={"architecture": hash_architecture(weights), "weights": hash_weights(weights)}
        )
        if self._exists(kind, record.fingerprint, RECORD):
            return self._record(kind, record.fingerprint)
        target = f"{kind}/{record.fingerprint}"
        if self.local:
            with self.folder.errors(), replacing_folder(Path(self.folder.inner(target))) as folder:
                self._fill(folder, record, weights)
        else:
            record = record.model_copy(update={"file": f"weights-{record.weights[:16]}.safetensors"})
            with tempfile.TemporaryDirectory() as scratch:
                self._fill(Path(scratch), record, weights)
                self.folder.put(f"{target}/{record.file}", Path(scratch) / record.file)
                self._publish(f"{target}/{RECORD}", (Path(scratch) / RECORD).read_bytes())
        return self._record(kind, record.fingerprint)

    def _publish(self, name: str, content: bytes) -> None:
        """Create a record if there is none. Storage without exclusive creation replaces it whole."""
        try:
            self.folder.create(name, content)
        except NotExclusiveError:
            self.folder.write(name, content)

    @staticmethod
    def _fill(folder: Path, record: Ingredient, weights: Weights) -> Ingredient:
        path = folder / record.file
        write_safetensors(path, weights, {"fingerprint": record.fingerprint})
        record = record.model_copy(update={"file_sha256": sha256_file(path), "file_bytes": path.stat().st_size})
        write_json(folder / RECORD, record.model_dump(mode="json"))
        return record

    def _record(self, kind: str, name: str) -> Ingredient:
        try:
            return Ingredient.model_validate_json(self.folder.read(f"{kind}/{name}/{RECORD}"))
        except FileNotFoundError:
            known = ", ".join(other[:8] for other in self._names(kind)[:8]) or "none"
            raise StorageError(f"The pool {self.url} holds no ingredient {name[:8]}; it has: {known}.") from None
        except ValidationError as error:
            raise StorageError(
                f"{self._path(kind, name, RECORD)} is not a whole ingredient record ({error.error_count()} faults, the first: "
                f"{error.errors()[0]['msg']}). Remove the folder {self._path(kind, name)} and run the sweep again: "
                f"only this ingredient is made anew."
            ) from error

    def _weights(self, kind: str, record: Ingredient, verify: bool = False) -> dict[str, Tensor]:
        path, again = self._path(kind, record.fingerprint, record.file), self._again(kind, record.fingerprint)
        with self.folder.fetched(f"{kind}/{record.fingerprint}/{record.file}") as local:
            self._check_size(path, local, record, again)
            try:
                weights = read_safetensors(local)
            except StorageError as error:
                raise StorageError(f"{error} {again}") from error
        check_finite(weights, where=path)
        if hash_architecture(weights) != record.architecture:
            raise WeightsError(f"{path} does not hold the tensors that its record names. {again}")
        if verify and hash_weights(weights) != record.weights:
            raise StorageError(f"{path} was altered after it was written: its hash is not the recorded one. {again}")
        return weights

    def _sized(self, kind: str, name: str) -> bool:
        if not self.local:
            return False
        path = self._path(kind, name, WEIGHTS)
        self._check_size(path, Path(path), self._record(kind, name), self._again(kind, name))
        return True

    def _again(self, kind: str, name: str) -> str:
        return f"Remove the folder {self._path(kind, name)} and run the same command again: it is made anew."

    @staticmethod
    def _check_size(path: str, local: Path, record: Ingredient, again: str) -> None:
        # The size tells a truncated file before it is mapped: a mapped file that is short kills the process.
        size = local.stat().st_size if local.exists() else -1
        if size != record.file_bytes:
            found = "is absent" if size < 0 else f"has {size} bytes"
            raise StorageError(f"{path} {found}; {record.file_bytes} were written. {again}")

    def _names(self, kind: str) -> list[str]:
        return [name for name in self.folder.names(kind) if self._exists(kind, name, RECORD)]

    def _exists(self, *parts: str) -> bool:
        return self.folder.exists("/".join(parts))

    def _path(self, *parts: str) -> str:
        return self.folder.inner(*parts)


def _predictions(weights_hash: str, split_hash: str) -> str:
    return f"predictions/{weights_hash[:24]}-{split_hash[:24]}.safetensors"
