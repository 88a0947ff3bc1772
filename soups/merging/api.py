"""`merge`: models in, one model out, in memory or on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError, StorageError, WeightsError
from soups.merging.method import Method
from soups.merging.methods import make_method
from soups.merging.operands import Source
from soups.merging.stream import DEFAULT_BUDGET, Job, MemorySink, run
from soups.stores.checkpoint import TorchStore
from soups.stores.files import fingerprint
from soups.stores.folder import is_folder_of
from soups.stores.names import reconcile
from soups.stores.opening import Checkpoint, open_store
from soups.stores.remote import RemoteFolderWriter, uploaded
from soups.stores.sources import is_remote
from soups.stores.store import Store, TensorMeta, headers
from soups.stores.torch_writer import TorchWriter, plain_parts
from soups.stores.writer import DEFAULT_SHARD_BYTES, FileWriter, FolderWriter, Writer, carried_files
from soups.weights import describe_mismatch

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
Methods = Method | str | Mapping[str, Method | str]


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, from headers alone.

    Attributes:
        jobs: one for each tensor of the output.
        tied: names that repeat another one.
    """

    jobs: tuple[Job, ...]
    tied: dict[str, str]

    def fingerprint(self, **more: Any) -> str | None:
        """Return a hash of what decides the output's bits: methods, tensors, the sources' files and their times of change.

        `None` where a source is in memory, which only a look at its contents could tell from another.

        Args:
            more: what else decides.
        """
        entries: list[Any] = []
        for job in self.jobs:
            places = [source.store.identity(source.key) for source in _sources(job)]
            if any(place is None for place in places):
                return None
            dtype = str(job.meta.dtype)
            entries.append([job.key, job.meta.shape, dtype, repr(job.method), job.base is not None, places])
        return fingerprint({"format": 1, "torch": torch.__version__, "jobs": entries, "tied": self.tied, **more})

    @property
    def outputs(self) -> dict[str, TensorMeta]:
        """Name, shape and dtype of each tensor that is written."""
        return {job.key: job.meta for job in self.jobs}

    @property
    def bytes_to_read(self) -> int:
        """Bytes of one visit to every source; methods that look at tensors first visit them more than once."""
        return sum(job.nbytes() for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the output's tensors."""
        return sum(job.meta.nbytes for job in self.jobs)


def plan_merge(
    method: Methods, models: Sequence[Store], base: Store | None = None, *, dtype: torch.dtype | None = None
) -> MergePlan:
    """Check that models fit and say what is to be made of which tensors, reading headers only.

    Args:
        method: one for everything; or by pattern of tensor names, the first that matches: tensors that match none are the
            base's, or the first model's.
        models: the stores.
        base: the base model's.
        dtype: of the output's floating tensors; the base's (or first model's) when `None`.

    Raises:
        WeightsError: models differ in names, shapes or kinds, or hold complex numbers.
        ConfigError: the number of models, or the lack of a base, does not suit a method.
    """
    if not models:
        raise ConfigError("A merge needs at least one model.")
    donor = base or models[0]
    rules = {"*": method} if isinstance(method, Method | str) else dict(method)
    made = {pattern: make_method(rule) if isinstance(rule, str) else rule for pattern, rule in rules.items()}
    for pattern, rule in made.items():
        rule.check(
            len(models), has_base=base is not None, name=_name(rule) + ("" if pattern == "*" else f" for {pattern!r}")
        )
    expected = headers(donor)
    for store in models:
        if problem := describe_mismatch(expected, headers(store)):
            raise WeightsError(
                f"{store.location} does not fit {donor.location}: {problem}. Models that are merged need the same "
                f"architecture, head included. Map tensors that are the same under other names by rename; else leave this one out, "
                f"or fine-tune it again from the shared base."
            )
    tied = _tied(donor, models)
    jobs: list[Job] = []
    used: set[str] = set()
    for key in donor:
        pattern = next((pattern for pattern in made if fnmatchcase(key, pattern)), None)
        if pattern:
            used.add(pattern)
        if key in tied:
            continue
        meta = donor.meta(key)
        if meta.dtype.is_complex:
            raise WeightsError(f"{donor.location}: {key!r} holds complex numbers, which merging does not support.")
        if not meta.dtype.is_floating_point or pattern is None:
            jobs.append(Job(key, meta, None, (Source(donor, key),)))
            continue
        out = TensorMeta(meta.shape, dtype or meta.dtype)
        sources = tuple(Source(store, key) for store in models)
        jobs.append(Job(key, out, made[pattern], sources, Source(base, key) if base else None))
    unused = [pattern for pattern in made if pattern not in used]
    if unused:
        raise ConfigError(
            f"The pattern {unused[0]!r} matches no tensor of {donor.location}, or only after an earlier one."
        )
    return MergePlan(tuple(jobs), tied)


def _sources(job: Job) -> list[Source]:
    return [*job.models, *([job.base] if job.base else [])]


def _name(method: Method) -> str:
    return type(method).__name__


def _tied(donor: Store, models: Sequence[Store]) -> dict[str, str]:
    """Names that are tied in every model: one that was untied by training is merged by itself."""
    common = donor.tied()
    for store in models:
        # The same pair may be the other way round, so what counts is the representative.
        tied = store.tied()
        common = {a: b for a, b in common.items() if tied.get(a, a) == tied.get(b, b)}
    return common


def execute(
    plan: MergePlan,
    out: str | os.PathLike[str] | None,
    *,
    files: Mapping[str, bytes | Path] | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Tensor] | Path | str:
    """Carry out a plan.

    Args:
        plan: from `plan_merge`.
        out: what to make: a `.safetensors`, `.pt`, `.pth` or `.bin` file, a `.ckpt` with the hyperparameters of the base (or
            the first model) where that is one, or a folder; or an fsspec URL of one of these; `None` returns the weights. A folder whose making was
            interrupted is continued from its finished shards, if nothing that decides its bits has changed.
        files: further files for a folder.
        metadata: text to text, for the file headers.
        shard_bytes: most bytes in one file of a folder.
        overwrite: replace what is at `out`.
        options: `run`'s.

    Returns:
        The weights, or the path or URL that was written.
    """
    if out is None:
        sink = MemorySink(plan.outputs)
        run(plan.jobs, sink, **options)
        return sink.weights | {name: sink.weights[first] for name, first in plan.tied.items()}
    target = os.fspath(out)
    check_output(target, [source.store for job in plan.jobs for source in _sources(job)])
    is_file = Path(target).suffix in (".safetensors", *_TORCH)
    if is_remote(target) and is_file:
        with uploaded(target, overwrite=overwrite) as local:
            _write(plan, _file_writer(plan, local, metadata, overwrite), options)
        return target
    if is_file:
        _write(plan, _file_writer(plan, Path(target), metadata, overwrite), options)
        return Path(target)
    device = str(options.get("device", "cpu"))
    settings: dict[str, Any] = {
        "metadata": metadata,
        "tied": plan.tied,
        "shard_bytes": shard_bytes,
        "files": files,
        "overwrite": overwrite,
        "fingerprint": plan.fingerprint(metadata=dict(metadata or {}), shard_bytes=shard_bytes, device=device),
    }
    if is_remote(target):
        _write(plan, RemoteFolderWriter(target, plan.outputs, **settings), options)
        return target
    _write(plan, FolderWriter(target, plan.outputs, **settings), options)
    return Path(target)


def _file_writer(plan: MergePlan, path: Path, metadata: Mapping[str, str] | None, overwrite: bool) -> Writer:
    if path.suffix == ".safetensors":
        return FileWriter(path, plan.outputs, metadata=metadata, tied=plan.tied, overwrite=overwrite)
    donor = plan.jobs[0].base or plan.jobs[0].models[0] if plan.jobs else None
    beside = plain_parts(donor.store.root) if donor and isinstance(donor.store, TorchStore) else {}
    return TorchWriter(path, plan.outputs, tied=plan.tied, beside=beside, overwrite=overwrite)


def _write(plan: MergePlan, writer: Writer, options: Mapping[str, Any]) -> None:
    with writer:
        run(plan.jobs, writer, finished=writer.finished, part=writer.part, **options)


def check_output(target: str, stores: Sequence[Store]) -> None:
    """Check that an output is none of the inputs, nor inside one.

    Raises:
        StorageError: it is.
    """

    def real(place: str) -> PurePath:
        return PurePosixPath(place.rstrip("/")) if is_remote(place) else Path(place).resolve()

    for location in {store.location for store in stores}:
        for part in location.split("+"):
            if real(target) == real(part) or real(part) in real(target).parents or real(target) in real(part).parents:
                raise StorageError(
                    f"The output {target} and the input {part} are in one place. Inputs are never written to; choose another."
                )


def _opened(place: Checkpoint, stack: ExitStack) -> Store:
    """Open a place until the stack ends; a store that the caller opened stays open."""
    return place if isinstance(place, Store) else stack.enter_context(open_store(place))


def _under_one_set_of_names(
    stores: Sequence[Store], start: Store | None, rename: Mapping[str, str] | None
) -> tuple[list[Store], Store | None]:
    every = dict(enumerate([*stores, *([] if start is None else [start])]))
    folders = {number: folder for number, store in every.items() if (folder := is_folder_of(store)) is not None}
    shown = reconcile(every, 0 if start is None else len(stores), folders, rename=rename).stores
    return [shown[number] for number in range(len(stores))], None if start is None else shown[len(stores)]


def merge(
    method: Methods,
    models: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    compiled: bool | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    rename: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor] | Path | str:
    """Merge models: checkpoints of any kind in, weights or a safetensors output out.

    Floating tensors are merged; integer and bool ones are copied from the base (or the first model); tied ones are merged
    once. Arithmetic is in float32 (float64 for float64 models) with one rounding to the output's dtype.

    Args:
        method: a `Method`, a name of one with its defaults, or either by pattern of tensor names.
        models: whatever `open_store` takes.
        base: the model that the others started from, for methods on task vectors.
        out: a file (`.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`), a folder, or an fsspec URL of one of these to make;
            `None` returns the weights. A folder gets the configuration and tokenizer files of the base (or the first model) where that is a folder.
        dtype: of the output's floating tensors; the base's (or first model's) when `None`.
        budget: bytes of working memory.
        threads: workers; one a core when `None`.
        device: where to compute.
        compiled: use loops in C where there are such: the same bits, sooner; `None`: if they were built.
        shard_bytes: most bytes in one file of a folder.
        overwrite: replace what is at `out`.
        rename: regular expressions and replacements, applied to the models' tensor names. Names that transformers itself
            maps onto each other need none.
        progress: told the bytes of sources that were finished with.

    Returns:
        The weights, or the path that was written.

    Raises:
        SoupError: see `open_store`, `plan_merge`, `run` and the writers.

    >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    >>> merge("linear", [a, b])["w"]
    tensor([2., 4.])
    """
    with ExitStack() as stack:
        stores = [_opened(place, stack) for place in models]
        start = _opened(base, stack) if base is not None else None
        folder = is_folder_of(start or stores[0])
        stores, start = _under_one_set_of_names(stores, start, rename)
        plan = plan_merge(method, stores, start, dtype=dtype)
        metadata = {"soups.merge": json.dumps({"method": repr(method), "models": [store.location for store in stores]})}
        return execute(
            plan,
            out,
            files=dict(carried_files(folder)) if folder else None,
            metadata=metadata,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            budget=budget,
            threads=threads,
            device=device,
            compiled=compiled,
            progress=progress,
        )
