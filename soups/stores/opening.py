"""`open_store`: any checkpoint, by what is at the path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from soups.errors import StorageError
from soups.stores.checkpoint import TorchStore, strip_prefix
from soups.stores.distributed import DistributedStore, is_distributed
from soups.stores.folder import FolderStore, is_model_folder
from soups.stores.lora import LoRAStore, base_of, is_adapter
from soups.stores.memory import DictStore
from soups.stores.quantised import as_numbers
from soups.stores.safetensors import SafetensorsStore
from soups.stores.sources import file_system, is_remote, open_bytes
from soups.stores.store import Store
from soups.stores.views import RenamedStore, StoreView

Checkpoint = str | os.PathLike[str] | Mapping[str, Tensor] | Store
"""A checkpoint by its path or URL, weights in memory, or an open store: whatever `open_store` takes."""

_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def open_store(
    place: Checkpoint,
    *,
    state: str | None = None,
    prefix: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    rename: Mapping[str, str] | None = None,
    as_stored: bool = False,
) -> Store:
    """Open a checkpoint for lazy reading.

    Weights in FP8 with scales are read as the numbers that they stand for (float32); see `soups.stores.quantised`.

    Args:
        place: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file, a Hugging Face folder, an fsspec URL of
            either, the folder of a PEFT LoRA adapter (merged into the base that it names) or `BASE+ADAPTER`, weights in
            memory, or a store (returned as it is).
        state: which weights of a training checkpoint (see `TorchStore`): `"raw"`, `"average"`, `"average:NAME"`, a path.
        prefix: keep only tensors whose names begin with this, without it: `"model."` turns a LightningModule's names into
            its network's.
        adapter: a PEFT LoRA folder to apply.
        rename: regular expressions and replacements for the adapter's names, where the model has others.
        as_stored: show quantised checkpoints as they are stored: to look at, not to compute with.

    Returns:
        The store; close it, or use it in a `with` block.

    Raises:
        StorageError: nothing is there, or it is damaged, hostile or of an unknown kind.
        WeightsError: the prefix or the adapter does not fit, or the weights are quantised in a way that cannot be undone.
    """
    store = _open(place, state)
    try:
        if not as_stored and not isinstance(place, Store) and not isinstance(store, StoreView):
            store = _numbers(store)
        if prefix:
            store = RenamedStore(store, strip_prefix(store.keys(), prefix, store.location).__getitem__)
        return LoRAStore(store, adapter, rename=rename) if adapter else store
    except BaseException:
        store.close()
        raise


def _open(place: str | os.PathLike[str] | Mapping[str, Tensor] | Store, state: str | None) -> Store:
    if isinstance(place, Store):
        return place
    if isinstance(place, Mapping):
        return DictStore(place)
    text = os.fspath(place)
    suffix = Path(text).suffix.lower()
    if not is_remote(text) and is_distributed(Path(text)):
        return DistributedStore(text, state)
    if not is_remote(text) and is_adapter(Path(text)) and not is_model_folder(Path(text)):
        return _adapted(str(base_of(Path(text))), text, state)
    if "+" in text and not is_remote(text) and not Path(text).exists():
        base, adapter = split_adapter(text)
        if Path(base).exists() and is_adapter(Path(adapter)):
            return _adapted(base, adapter, state)
    if _is_folder(text):
        return _no_state(FolderStore(text), state)
    if suffix not in (".safetensors", *_TORCH) and (is_remote(text) or Path(text).is_file()):
        with_source = open_bytes(text)
        start = with_source.read(0, min(2, with_source.size))
        with_source.close()
        suffix = ".pt" if start in (b"PK", b"\x80\x02") else ".safetensors"
    if suffix in _TORCH:
        return TorchStore(text, state)
    if suffix == ".safetensors":
        return _no_state(SafetensorsStore(text), state)
    raise StorageError(
        f"There is no checkpoint at {text}. Name a .safetensors, .pt, .pth, .bin or .ckpt file, a model folder on this "
        f"machine, or a URL such as s3://bucket/file.safetensors."
    )


def split_adapter(text: str) -> tuple[str, str]:
    """Split `BASE+ADAPTER`; the adapter is empty where none is named.

    A "+" can also be a part of a path: the longest beginning that is there is the base. Where none is, the first "+" counts.

    >>> split_adapter("org/base+org/adapter"), split_adapter("org/base")
    (('org/base', 'org/adapter'), ('org/base', ''))
    """
    cuts = [len(text), *(place for place in range(len(text) - 1, -1, -1) if text[place] == "+")]
    for cut in cuts:
        if cut and Path(text[:cut]).exists():
            return text[:cut], text[cut + 1 :]
    base, _, adapter = text.partition("+")
    return base, adapter


def _numbers(store: Store) -> Store:
    try:
        return as_numbers(store, store.config() if isinstance(store, FolderStore) else None)
    except BaseException:
        store.close()
        raise


def _adapted(base: str, adapter: str, state: str | None) -> Store:
    store = _numbers(_open(base, state))
    try:
        return LoRAStore(store, adapter)
    except BaseException:
        store.close()
        raise


def _is_folder(place: str) -> bool:
    if not is_remote(place):
        return Path(place).is_dir()
    if Path(place).suffix.lower() in (".safetensors", *_TORCH):
        return False  # without asking the server
    system, path = file_system(place)
    return bool(system.isdir(path))


def _no_state(store: Store, state: str | None) -> Store:
    if state is not None:
        store.close()
        raise StorageError(f"{store.location} holds one set of weights; state={state!r} is for .ckpt and .pt files.")
    return store
