"""Hugging Face folders: one file or several shards with an index, safetensors first, `.bin` where there is nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from soups.errors import StorageError
from soups.stores.checkpoint import TorchStore
from soups.stores.safetensors import SafetensorsStore
from soups.stores.sources import file_system, is_remote
from soups.stores.store import Extent, ExtentStore, Store
from soups.stores.views import StoreView

# What makes a folder a model, in the order in which it is looked for.
_WHOLE = (
    "model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip


class _LocalFolder:
    """A folder's files; names that lead out of it are refused."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self) -> list[str]:
        return sorted(file.name for file in self.path.iterdir())

    def place(self, name: str) -> str:
        return str(contained(self.path, name))

    def text(self, name: str) -> str:
        return contained(self.path, name).read_text(encoding="utf-8")


class _RemoteFolder:
    """A folder behind an fsspec URL."""

    def __init__(self, url: str) -> None:
        self.path = url.rstrip("/")
        self._system, root = file_system(self.path)
        try:
            self._names = {
                PurePosixPath(entry["name"]).name: str(entry["name"])
                for entry in self._system.ls(root, detail=True)
                if entry["type"] == "file"
            }
        except OSError as error:
            raise StorageError(f"Cannot list {url}: {error}. Check the address and the connection.") from error

    def exists(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        return sorted(self._names)

    def place(self, name: str) -> str:
        if PurePosixPath(name).name != name:
            raise StorageError(f"{self.path}/{name} leads out of its folder, which was refused.")
        return f"{self.path}/{name}"

    def text(self, name: str) -> str:
        return cast("bytes", self._system.cat_file(self._names[name])).decode("utf-8")


class FolderStore(ExtentStore):
    """A model folder in Hugging Face's layout, on this machine or behind an fsspec URL.

    Attributes:
        folder: where it is on this machine; `None` for a URL.

    Raises:
        StorageError: no weights in it; an index that is damaged, names absent shards or files outside the folder, or does
            not agree with the shards; one tensor in two shards.
    """

    def __init__(self, folder: str | Path) -> None:
        remote = is_remote(str(folder))
        self.folder = None if remote else Path(folder)
        self.location = str(folder)
        self._files = _RemoteFolder(str(folder)) if remote else _LocalFolder(folder)
        self._stores: list[SafetensorsStore | TorchStore] = []
        try:
            names, index = self._find()
            owner: dict[str, str] = {}
            extents: dict[str, Extent] = {}
            tied: dict[str, str] = {}
            unreadable: dict[str, str] = {}
            for name in names:
                store = open_file(self._files.place(name))
                self._stores.append(store)
                for key in store:
                    if key in owner:
                        raise StorageError(
                            f"{self.location}: tensor {key!r} is in both {owner[key]} and {name}, so it is not clear which one "
                            f"counts. Remove the shards of the older model and try again."
                        )
                    owner[key] = name
                    if key in store.unreadable:
                        unreadable[key] = store.unreadable[key]
                    elif key not in store.tied():
                        extents[key] = store.extent(key)
                tied |= store.tied()
            if index is not None:
                self._check_index(
                    index, {key: name for key, name in owner.items() if key in extents or key in unreadable}
                )
            self.metadata = dict(self._stores[0].metadata) if self._stores else {}
        except BaseException:
            self.close()
            raise
        super().__init__(extents, tied, unreadable)
        self._indirect = {
            key: store for store in self._stores if isinstance(store, TorchStore) for key in store.indirect
        }

    def _find(self) -> tuple[list[str], Mapping[str, str] | None]:
        for name in _WHOLE:  # safetensors first: `.bin` files beside them are an older copy
            if not self._files.exists(name):
                continue
            if not name.endswith(".index.json"):
                return [name], None
            index = read_index(f"{self.location}/{name}", self._files, name)
            shards = sorted(set(index.values()))
            absent = [shard for shard in shards if not self._files.exists(shard)]
            for shard in shards:
                self._files.place(shard)
            if absent:
                raise StorageError(
                    f"{self.location}/{name} names {len(absent)} of {len(shards)} shards that are not there, "
                    f"{absent[0]!r} among them. Finish the download or the copy."
                )
            return shards, index
        there = self._files.names()
        loose = [name for name in there if name.endswith(".safetensors") and name != "adapter_model.safetensors"]
        if loose:
            self._check_numbered(loose)
            return loose, None
        if self._files.exists("adapter_config.json"):
            raise StorageError(
                f"{self.location} is a LoRA adapter, not a whole model. Name the model that it belongs to as well: BASE+ADAPTER."
            )
        raise StorageError(
            f"{self.location} holds no weights: neither model.safetensors nor pytorch_model.bin nor an index of shards; "
            f"it has {there[:8]}. Name a model folder, or a single file."
        )

    def _check_numbered(self, names: list[str]) -> None:
        for name in names:
            match = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..+)", name)
            if match:
                expected = [
                    f"{match[1]}{i:0{len(match[2])}d}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)
                ]
                absent = [file for file in expected[:10_000] if file not in names]
                if absent:
                    raise StorageError(f"{self.location} lacks shard {absent[0]!r}. Finish the download or the copy.")

    def _check_index(self, index: Mapping[str, str], owner: Mapping[str, str]) -> None:
        wrong = [key for key, shard in index.items() if owner.get(key) != shard]
        unlisted = [key for key in owner if key not in index]
        if wrong or unlisted:
            first = wrong[0] if wrong else unlisted[0]
            raise StorageError(
                f"{self.location}: the index and the shards do not agree on {len(wrong) + len(unlisted)} tensors, {first!r} "
                f"among them: listed in {index.get(first)}, found in {owner.get(first)}. Copy the folder again, or remove "
                f"the index if the shards are whole."
            )

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Any = None) -> Any:
        """Return elements `start:stop` of a tensor."""
        store = self._indirect.get(self._tied.get(key, key))
        return store.read_flat(key, start, stop, out) if store else super().read_flat(key, start, stop, out)

    def config(self) -> dict[str, Any]:
        """Return the model's `config.json`; nothing where there is none, or none that can be read."""
        if not self._files.exists("config.json"):
            return {}
        try:
            found = json.loads(self._files.text("config.json"))
        except (OSError, ValueError):  # whoever needs it says what is wrong with it
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    @property
    def indirect(self) -> Collection[str]:
        """Names of tensors whose bytes in the file are not their own: in another order, or of another sign."""
        return self._indirect

    def close(self) -> None:
        """Close every shard."""
        for store in self._stores:
            store.close()


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder is one model in Hugging Face's layout."""
    return any((folder / name).exists() for name in _WHOLE)


def open_file(path: str) -> SafetensorsStore | TorchStore:
    """Open one file of weights by its ending."""
    return SafetensorsStore(path) if path.endswith(".safetensors") else TorchStore(path)


def read_index(path: str, files: _LocalFolder | _RemoteFolder, name: str) -> dict[str, str]:
    """Read an index of shards: tensor name to file name.

    Raises:
        StorageError: it is no JSON, or has no such map.
    """
    try:
        index = json.loads(files.text(name))
        weight_map = index["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("no weight_map")
        items = cast("dict[str, Any]", weight_map)
        if not all(isinstance(shard, str) for shard in items.values()):
            raise TypeError("file names that are no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} is not a whole index of shards ({error}). Copy or make it again.") from error
    return items


def contained(folder: Path, name: str) -> Path:
    """Return the path of a file that belongs to a folder.

    A link may lead to the `blobs` folder of the Hugging Face cache that the folder itself is a snapshot in, and to other
    places inside the folder, nowhere else.

    Raises:
        StorageError: the name or a link leads out of the folder.
    """
    path = folder / name
    pure = PurePosixPath(name.replace("\\", "/"))
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    target = path.resolve()
    if pure.is_absolute() or ".." in pure.parts or not any(target.is_relative_to(place) for place in allowed):
        raise StorageError(
            f"{path} leads out of its folder, to {target}. That was refused, because a model from elsewhere could reach any "
            f"file this way; put the file itself into the folder."
        )
    return path


def folder_of(store: Store) -> Path | None:
    """Return the folder on this machine that a model was opened from; that of the model underneath for a view."""
    while isinstance(store, StoreView):
        store = store.store
    return store.folder if isinstance(store, FolderStore) else None
