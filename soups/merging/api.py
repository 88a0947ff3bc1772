"""`merge` merges several checkpoints into one model, in memory or on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.attaching import check_weights
from soups.merging.keeping import decides_vocabulary, is_kept, untied_by_keeping
from soups.merging.methods import make_method
from soups.merging.output import execute
from soups.merging.plan import Methods, plan_merge
from soups.merging.stream import DEFAULT_BUDGET
from soups.statistics import Statistics
from soups.stores.companions import carried_files
from soups.stores.folder import folder_of
from soups.stores.lora import adapted_configuration
from soups.stores.names import reconcile
from soups.stores.opening import Checkpoint, open_store
from soups.stores.quantised import plain_config
from soups.stores.store import Store
from soups.stores.writer import DEFAULT_SHARD_BYTES


def _carried(folder: Path) -> dict[str, bytes | Path]:
    """Return a model's files other than its weights, with the quantisation removed from its configuration."""
    files: dict[str, bytes | Path] = dict(carried_files(folder))
    path = folder / "config.json"
    if "config.json" in files and b"quantization_config" in path.read_bytes():
        config = plain_config(json.loads(path.read_text(encoding="utf-8")))
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _opened(place: Checkpoint, stack: ExitStack) -> Store:
    """Open a place until the stack ends; a store that the caller opened stays open."""
    return place if isinstance(place, Store) else stack.enter_context(open_store(place))


def _under_one_set_of_names(
    stores: Sequence[Store], start: Store | None, rename: Mapping[str, str] | None
) -> tuple[list[Store], Store | None]:
    every = dict(enumerate([*stores, *([] if start is None else [start])]))
    folders = {number: folder for number, store in every.items() if (folder := folder_of(store)) is not None}
    shown = reconcile(every, 0 if start is None else len(stores), folders, rename=rename).stores
    return [shown[number] for number in range(len(stores))], None if start is None else shown[len(stores)]


def merge(
    method: Methods,
    models: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    statistics: Sequence[Statistics | str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    compiled: bool | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    rename: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    progress: Callable[[int], None] = lambda _: None,
    **parameters: Any,
) -> dict[str, Tensor] | Path | str:
    """Merge checkpoints of any kind; return the weights, or write them.

    Floating tensors are merged. Integer and bool tensors are copied from the base model, or from the first model if there is no
    base. Tied tensors are merged once. `linear` follows the rule of `soups.reduction`. Every other method computes in float32
    (float64 for float64 models); its result is rounded once, to the output's dtype.

    Args:
        method: a `Method`, a method's name, or a mapping from patterns of tensor names to either.
        models: the models to merge, in any form that `open_store` takes.
        base: the base model of the task vectors, for methods that need one.
        statistics: the statistics of each model, or their files, in the order of the models; for methods that need them.
        out: the file (`.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`), folder, or fsspec URL of either to write; `None` returns
            the weights. A folder also gets the configuration and tokenizer files of the base model (or the first model), if
            that is a folder.
        dtype: the dtype of the output's floating tensors; `None`: the base model's (or first model's).
        budget: bytes of working memory.
        threads: the number of threads; `None`: one per core.
        device: the device to compute on.
        compiled: use the compiled C kernels (bit-identical, faster); `None`: if available.
        shard_bytes: the largest size of one file in a folder, in bytes.
        overwrite: replace an existing output.
        rename: regular expressions and replacements for the models' tensor names. Names that transformers itself maps onto
            each other need none.
        keep: patterns of tensor names, such as `["classifier.*"]`. Matching tensors are taken unchanged from the base model (or
            the first model) and are ignored in the other models, whose heads may differ in size or be absent. The names are
            the base model's, after `rename`.
        progress: called with the number of source bytes that were processed since the last call.
        parameters: the method's parameters, if `method` is a name.

    Returns:
        The weights, or the path that was written.

    Raises:
        SoupError: see `open_store`, `plan_merge`, `run` and the writers.

    >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    >>> merge("linear", [a, b])["w"], merge("linear", [a, b], weight=[3, 1])["w"]
    (tensor([2., 4.]), tensor([1.5000, 3.0000]))
    """
    if parameters:
        if not isinstance(method, str):
            raise ConfigError(
                f"Parameters ({', '.join(parameters)}) go with the name of a method; a made method has its own already."
            )
        method = make_method(method, **parameters)
    if not models:
        raise ConfigError("A merge needs at least one model.")
    with ExitStack() as stack:
        stores = [_opened(place, stack) for place in models]
        start = _opened(base, stack) if base is not None else None
        found = [
            one if isinstance(one, Statistics) else stack.enter_context(Statistics.open(one))
            for one in statistics or []
        ]
        check_weights(stores, found)
        folder = folder_of(start or stores[0])
        stores, start = _under_one_set_of_names(stores, start, rename)
        keep = (keep,) if isinstance(keep, str) else tuple(keep)
        read = found if statistics is not None else None
        plan = plan_merge(method, stores, start, dtype=dtype, statistics=read, keep=keep)
        metadata = {"soups.merge": json.dumps({"method": repr(method), "models": [store.location for store in stores]})}
        files = _carried(folder) if folder else {}
        if isinstance(path := files.get("config.json"), Path):
            donor = start or stores[0]
            kept = [name for name in donor if is_kept(name, keep)]
            makers = [donor] if decides_vocabulary(kept) else [donor, *stores]
            untied = untied_by_keeping(donor, kept)
            files["config.json"] = adapted_configuration(path, makers, plan.tied, untied) or path
        return execute(
            plan,
            out,
            files=files,
            metadata=metadata,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            budget=budget,
            threads=threads,
            device=device,
            compiled=compiled,
            progress=progress,
        )
