"""Carry out a plan: into memory, a file or a folder, here or behind a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from torch import Tensor

from soups.errors import StorageError
from soups.merging.plan import MergePlan, sources_of
from soups.merging.stream import MemorySink, run
from soups.stores.checkpoint import TorchStore
from soups.stores.folder_writer import FolderWriter
from soups.stores.opening import split_adapter
from soups.stores.remote import RemoteFolderWriter, uploaded
from soups.stores.sources import is_remote
from soups.stores.store import Store
from soups.stores.torch_writer import TorchWriter, plain_parts
from soups.stores.writer import DEFAULT_SHARD_BYTES, FileWriter, Writer

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


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
    check_output(target, [source.store for job in plan.jobs for source in sources_of(job)])
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
        for part in filter(None, split_adapter(location)):
            if real(target) == real(part) or real(part) in real(target).parents or real(target) in real(part).parents:
                raise StorageError(
                    f"The output {target} and the input {part} are in one place. Inputs are never written to; choose another."
                )
