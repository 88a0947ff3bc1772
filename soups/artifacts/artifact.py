"""`open_artifact`: read an artifact, and make the model of one of its tasks."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from soups.artifacts.editing import write_with, write_without
from soups.artifacts.header import name_of, read_header
from soups.artifacts.method import WHOLE, PartMethod, Pieces
from soups.artifacts.methods import make_part_method
from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.merging.job import Job
from soups.merging.operands import Source
from soups.merging.output import execute
from soups.merging.plan import MergePlan
from soups.statistics import hash_store
from soups.stores import Checkpoint, SafetensorsStore, Store, TensorMeta, open_store
from soups.stores.companions import carried_files
from soups.stores.folder import folder_of
from soups.stores.views import StoreView


class TaskView(StoreView):
    """The model of one task: the base model, and what the artifact adds to it. Tensors are made while they are read.

    Args:
        base: the base model; closed with this view.
        artifact: the artifact's file.
        method: its method.
        task: the task.
    """

    def __init__(self, base: Store, artifact: Store, method: PartMethod, task: str) -> None:
        super().__init__(base)
        self.location = f"{artifact.location} ({task})"
        self._artifact, self._method, self._task = artifact, method, task
        self._shared = _pieces(artifact, "shared/")
        self._own = _pieces(artifact, f"task/{task}/")

    def changes(self, name: str) -> bool:
        """Tell whether the task has a tensor of its own."""
        return name in self._own or name in self._shared

    def change(self, name: str) -> str | None:
        """Return the identity of the pieces."""
        pieces = [*self._shared.get(name, {}).values(), *self._own.get(name, {}).values()]
        identities = [self._artifact.identity(piece) for piece in pieces]
        return None if any(one is None for one in identities) else f"{self._method!r}{identities}"

    def changed_meta(self, name: str) -> TensorMeta:
        """Return shape and dtype of a tensor of the task."""
        whole = self._own.get(name, {}).get(WHOLE)
        return self.store.meta(name) if whole is None else self._artifact.meta(whole)

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements of the base plus the task vector, or the expert's own."""
        own = Pieces(self._artifact, self._own.get(name, {}))
        if WHOLE in own.names:
            return own.read(WHOLE, start, stop)
        meta = self.store.meta(name)
        delta = self._method.decode(Pieces(self._artifact, self._shared.get(name, {})), own, meta, start, stop)
        base = self.store.read_flat(name, start, stop)
        return base.to(delta.dtype, copy=True).add_(delta).to(meta.dtype)


def _pieces(store: Store, prefix: str) -> dict[str, dict[str, str]]:
    """Return, for each tensor, its pieces' names in the file."""
    found: dict[str, dict[str, str]] = {}
    for name in store:
        if name.startswith(prefix):
            tensor, _, piece = name.removeprefix(prefix).rpartition("/")
            found.setdefault(tensor, {})[piece] = name
    return found


class Artifact:
    """An opened artifact. Use it in a `with` block, or call `close`.

    Args:
        path: the file.

    Attributes:
        header: the method, the base model and the experts that went in.

    Raises:
        StorageError: there is no such file, or it is truncated.
        WeightsError: it is no artifact, or a task's pieces are missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SafetensorsStore(path)
        try:
            self.header = read_header(self._file.metadata, self._file.location)
            self._method = make_part_method(self.header.method, **self.header.parameters)
        except BaseException:
            self._file.close()
            raise

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order in which they were packed."""
        return list(self.header.tasks)

    def bytes_of(self, task: str | None) -> int:
        """Return the bytes of a task's part; of the shared part for `None`."""
        prefix = name_of(task, "", "").rstrip("/") + "/"
        return sum(self._file.meta(name).nbytes for name in self._file if name.startswith(prefix))

    def open_task(self, task: str, base: Checkpoint | None = None) -> TaskView:
        """Return the model of a task as a store, to be merged, compared or written. Nothing is made before it is read.

        Args:
            task: which.
            base: the base model; where the artifact says that it was, when `None`. It is read once for its hash.

        Raises:
            ConfigError: there is no such task.
            WeightsError: this is another base model.
        """
        if task not in self.header.tasks:
            raise ConfigError(f"{self._file.location} has no task {task!r}; {did_you_mean(task, self.tasks)}")
        return TaskView(self._open_base(base), self._file, self._method, task)

    def _open_base(self, base: Checkpoint | None) -> Store:
        start = open_store(self.header.base.location if base is None else base)
        try:
            if hash_store(start) != self.header.base.weights_hash:
                raise WeightsError(
                    f"{start.location} is not the base model of {self._file.location}: the hashes of their weights differ. It "
                    f"was packed with {self.header.base.location}."
                )
        except BaseException:
            if start is not base:
                start.close()
            raise
        return start

    def remove(self, task: str, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write an artifact without a task: the bytes of one that never had it.

        Raises:
            ConfigError: there is no such task, no other one, or the shared part mixes tasks.
        """
        return write_without(self._file, self.header, self._method, task, out, overwrite=overwrite)

    def add(
        self,
        task: str,
        expert: Checkpoint,
        out: str | os.PathLike[str],
        *,
        base: Checkpoint | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write an artifact with one more task, the last: the bytes of one that was packed with it.

        Raises:
            ConfigError: there is such a task already, or the shared part mixes tasks.
            WeightsError: the expert or the base does not fit.
        """
        start = self._open_base(base)
        model = open_store(expert)
        try:
            return write_with(self._file, self.header, self._method, task, model, start, out, overwrite=overwrite)
        finally:
            for store, given in ((start, base), (model, expert)):
                if store is not given:
                    store.close()

    def materialize(
        self,
        task: str,
        out: str | os.PathLike[str] | None = None,
        *,
        base: Checkpoint | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> dict[str, Tensor] | Path | str:
        """Make the model of a task: return its weights, or write them in any format that a merge writes.

        Args:
            task: which.
            out: a file, a folder or a URL; see `soups.merging.execute`. A folder gets the configuration files of the base.
            base: the base model; where the artifact says that it was, when `None`.
            overwrite: replace what is at `out`.
            options: of the engine: `budget`, `threads`, `progress`.

        Raises:
            SoupError: see `open_task` and `soups.merging.execute`.
        """
        view = self.open_task(task, base)
        try:
            tied = view.tied()
            jobs = [Job(key, view.meta(key), None, (Source(view, key),)) for key in view if key not in tied]
            folder = folder_of(view.store)
            files = dict(carried_files(folder)) if folder else None
            return execute(MergePlan(tuple(jobs), tied), out, files=files, overwrite=overwrite, **options)
        finally:
            if view.store is not base:
                view.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact; see `Artifact`."""
    return Artifact(path)
