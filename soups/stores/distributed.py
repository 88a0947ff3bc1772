"""Distributed checkpoints (a folder with `.metadata`, as torch.distributed.checkpoint and Lightning's strategies write it)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from soups.errors import DataError, StorageError
from soups.stores.averages import KEY, plain_name
from soups.stores.files import storage_errors
from soups.stores.inert import HostileError, InertUnpickler, TensorRecord
from soups.stores.memory import DictStore
from soups.stores.states import RAW, States, read_states
from soups.stores.torch_zip import TorchArchive

METADATA = ".metadata"
# Where averages lie among the tensors of a distributed checkpoint.
SHARDED_PREFIX = f"{KEY}/"
# What a description of tensors and their places is made of.
_DESCRIBES = re.compile(
    r"torch\.(distributed\.checkpoint\.(metadata|filesystem|planner|_\w+)\.\w+|serialization\._get_layout|Size|strided|\w+_format"
    r"|_utils\.\w+)|collections\.OrderedDict|copyreg\.\w+|(posix)?pathlib\.\w+|pathlib\._local\.\w+"
)


class DistributedStore(DictStore):
    """One set of weights of a distributed checkpoint, read into memory.

    Args:
        folder: of the checkpoint.
        state: `None` or `"raw"` for the model's weights, `"average"`, or `"average:NAME"`.
        strict: whether every tensor of an average must have its place among the raw weights.
        plain: leave what wrappers put into names out of them.

    Attributes:
        averages: the raw weights and the averages in the checkpoint.

    Raises:
        StorageError: the folder is no whole checkpoint, or its description asks to run code.
        DataError: it has no such average.
    """

    def __init__(
        self, folder: str | Path, state: str | None = None, *, plain: bool = True, strict: bool = True
    ) -> None:
        self.averages: States[Tensor] = read_states(read_distributed(Path(folder)))
        if state not in (None, RAW, "average") and not state.startswith("average:"):
            raise DataError(
                f"{folder} is a distributed checkpoint: state={state!r} is none of 'raw' and 'average:NAME'."
            )
        name = RAW if state in (None, RAW) else state.partition(":")[2]
        weights: dict[str, Tensor] = {}
        made: dict[tuple[int, torch.dtype], Tensor] = {}
        for key, (tensor, dtype) in self.averages.select(name, str(folder), strict=strict).items():
            shared = made.setdefault((id(tensor), dtype), tensor.to(dtype))
            weights[plain_name(key) if plain else key] = shared
        super().__init__(weights, str(folder))


def is_distributed(folder: Path) -> bool:
    """Tell whether a folder is a distributed checkpoint."""
    return (folder / METADATA).is_file()


def read_distributed(folder: Path) -> dict[str, Any]:
    """Read a distributed checkpoint into the object tree that the same checkpoint has as one file.

    Raises:
        StorageError: the folder is no whole checkpoint, or its description asks to run code.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if not is_distributed(folder):
        raise StorageError(
            f"{folder} is a folder without a distributed checkpoint in it (no {METADATA}). Check the path."
        )
    _check_description(folder / METADATA)
    checkpoint: dict[str, Any] = {}
    if (folder / "meta.pt").exists():
        archive = TorchArchive(folder / "meta.pt")
        try:
            checkpoint = cast("dict[str, Any]", _in_memory(archive.root, archive))
        finally:
            archive.close()
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        wanted: dict[str, Tensor] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }
        with storage_errors(folder, "read"):
            load(wanted, checkpoint_id=folder, no_dist=True)
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StorageError(
            f"{folder} is not a whole distributed checkpoint ({str(error).splitlines()[0]}). Copy or make it again."
        ) from error
    prefix = "state_dict." if any(key.startswith("state_dict.") for key in wanted) else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in wanted.items() if key.startswith(prefix)}
    checkpoint["state_dict"] = {key: t for key, t in tensors.items() if not key.startswith(SHARDED_PREFIX)}
    for name, entry in checkpoint.get(KEY, {}).get("averages", {}).items():
        start = f"{SHARDED_PREFIX}{name}/mean/"
        sharded = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        entry["weights"] = {**entry.get("weights", {}), **sharded}
    return checkpoint


def _check_description(path: Path) -> None:
    """Check that torch, which unpickles the description with all rights, would be asked for descriptions only.

    Raises:
        StorageError: it names anything else.
    """
    names: list[str] = []

    class Listing(InertUnpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            names.append(f"{module_name}.{global_name}")
            return super().find_class(module_name, global_name)

    try:
        with path.open("rb") as file:
            Listing(file).load()
    except HostileError as error:
        raise StorageError(
            f"{path} asks to run {error} when it is loaded. It was refused and nothing was run."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise StorageError(f"{path} is damaged ({type(error).__name__}: {error}). Copy or make it again.") from error
    for name in names:
        dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
        if not dtype and not _DESCRIBES.fullmatch(name):
            raise StorageError(
                f"{path} names {name}, which no description of a checkpoint needs. It was refused and nothing was run."
            )


def _in_memory(value: Any, archive: TorchArchive) -> Any:
    if isinstance(value, TensorRecord):
        return archive.read(value)
    if isinstance(value, Mapping):
        return {key: _in_memory(item, archive) for key, item in cast("Mapping[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(_in_memory(item, archive) for item in cast("list[Any]", value))
    return value
