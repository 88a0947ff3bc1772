"""Checkpoints that were made elsewhere, as ingredients: found in a folder, fitted to a network's names, told apart.

Nothing is copied and nothing is written beside them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.checkpoint import TorchStore
from soups.stores.companions import is_left_by_training
from soups.stores.distributed import is_distributed
from soups.stores.folder import folder_of, is_model_folder
from soups.stores.lora import LoRAStore, is_adapter
from soups.stores.memory import HeaderStore
from soups.stores.names import reconcile
from soups.stores.opening import open_store
from soups.stores.sources import is_remote
from soups.stores.store import Store, TensorMeta, headers
from soups.stores.views import AliasedStore, RenamedStore
from soups.weights import Weights, describe_mismatch, tied_names

CheckpointPath = str | os.PathLike[str]

_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".pth.tar")


def find_checkpoints(places: CheckpointPath | Sequence[CheckpointPath]) -> dict[str, str]:
    """Return the checkpoints at some places, by a short name: their path below the folder, without its ending.

    Args:
        places: a folder that is searched with those below it, or a list of files, Hugging Face folders and URLs. A Hugging
            Face folder is one checkpoint, and so is the folder of a LoRA adapter, which stands for its base with the
            adapter merged. Hidden folders and states of training are left out.

    Raises:
        StorageError: a place does not exist, or a folder holds no checkpoint.
    """
    if isinstance(places, (str, os.PathLike)):
        folder = Path(places).expanduser()
        if is_remote(places) or not folder.is_dir() or _is_one(folder):
            return find_checkpoints([places])
        found = sorted(_below(folder))
        if not found:
            raise StorageError(
                f"{folder} holds no checkpoints: neither files that end in {', '.join(_ENDINGS)} nor folders of models or of LoRA adapters."
            )
        return _named([(path.relative_to(folder).as_posix(), str(path)) for path in found])
    chosen: list[tuple[str, str]] = []
    for place in places:
        text = os.fspath(place)
        if not is_remote(text):
            path = Path(text).expanduser()
            if not path.exists():
                raise StorageError(f"There is no checkpoint at {path}. Check the path.")
            text = str(path)
        chosen.append((Path(text).name, text))
    if len({name for name, _ in chosen}) < len(chosen):
        chosen = [(text.removeprefix("/"), text) for _, text in chosen]
    return _named(chosen)


def _below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += [path] if _is_one(path) else _below(path)
        elif path.name.endswith(_ENDINGS) and not is_left_by_training(path.name):
            found.append(path)
    return found


def _is_one(folder: Path) -> bool:
    """Tell whether a folder is one checkpoint: a model, a distributed checkpoint, or an adapter of a model."""
    return is_model_folder(folder) or is_distributed(folder) or is_adapter(folder)


def _named(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    plain = {path: re.sub(r"(\.pth)?\.[A-Za-z]+$", "", name) or name for name, path in found}
    # Two files that differ in their ending alone keep it.
    repeated = {name for name in plain.values() if list(plain.values()).count(name) > 1}
    return {(name if plain[path] in repeated else plain[path]): path for name, path in found}


def fitted(store: Store, like: Weights, prefix: str | None = None) -> Store:
    """Return a store under the names of `like`, with its tensors and no others.

    Args:
        store: closed with the one that is returned.
        like: names and shapes that are wanted: a network's state dict.
        prefix: of the names in the store; None to find it (a LightningModule's "model.", say).

    Raises:
        WeightsError: tensors are missing, unexpected, or of another shape.
    """
    names = store.keys()
    if prefix is None:
        prefix = _find_prefix(names, like)
    cut = len(prefix)
    result: Store = RenamedStore(store, lambda key: key[cut:] if key.startswith(prefix) else None)
    held = set(result.keys())
    # safetensors keeps one name of tied tensors.
    aliases = {name: first for name, first in _ties(like).items() if name not in held and first in held}
    if aliases:
        result = AliasedStore(result, aliases)
    wanted = _empty(like)
    if describe_mismatch(wanted, headers(result)):
        result = _under_names(result, wanted, folder_of(store), whole=not isinstance(store, LoRAStore))
    if problem := describe_mismatch(wanted, headers(result)):
        raise WeightsError(
            f"{store.location} does not fit the model: {problem}. It has another architecture or another head, or its "
            f"tensors have names of their own (pool.prefix=…, pool.state=… choose among those in it)."
        )
    return result


def _ties(like: Weights) -> dict[str, str]:
    tied = tied_names(like)
    return {**tied, **{first: name for name, first in tied.items()}}


def _find_prefix(names: Sequence[str], like: Weights) -> str:
    wanted = list(like)
    if not wanted or set(wanted) & set(names):
        return ""
    prefixes = {name[: -len(wanted[0])] for name in names if name.endswith(f".{wanted[0]}")}
    held = set(names)
    return max(sorted(prefixes), key=lambda prefix: sum(prefix + name in held for name in wanted), default="")


def _under_names(store: Store, like: Weights, folder: Path | None, *, whole: bool) -> Store:
    """Return a store under a network's names as far as they can be found.

    Args:
        store: the checkpoint.
        like: the network's names and shapes.
        folder: the checkpoint's, whose configuration tells the architecture.
        whole: keep tensors that the network does not have, so that they are seen; an adapter's base may have heads of its own.
    """
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in like.items()}
    places = {"checkpoint": folder} if folder else {}
    shown = reconcile({"network": HeaderStore("the network", plan), "checkpoint": store}, "network", places)
    result = shown.stores["checkpoint"]
    return result if whole else RenamedStore(result, lambda name: name if name in like else None)


def _empty(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in weights.items()}


def open_fitted(place: CheckpointPath, like: Weights, state: str | None = None, prefix: str | None = None) -> Store:
    """Open a checkpoint of any kind under a network's names; see `soups.stores.open_store` and `fitted`."""
    store = open_store(place, state=state)
    try:
        return fitted(store, like, prefix)
    except BaseException:
        store.close()
        raise


def recorded_classes(place: CheckpointPath) -> list[str] | None:
    """Return the class names that a checkpoint records, in the order of its logits, or None.

    They are looked for in a Hugging Face folder's `config.json` (`id2label`), among the hyper-parameters of a Lightning
    or timm checkpoint (`classes`, `class_names`, `class_to_idx`, `id2label`), and in the lineage of our soups.

    Raises:
        StorageError: the checkpoint cannot be read.
    """
    text = os.fspath(place)
    if not is_remote(text) and Path(text).is_dir():
        path = Path(text) / "config.json"
        try:
            return _classes(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} is not a whole configuration ({error}). Copy the folder again.") from error
    with open_store(text) as store:
        if isinstance(store, TorchStore):
            return _classes(store.root)
        try:
            return _classes(json.loads(store.metadata.get("lineage", "{}")))
        except ValueError:  # a file from elsewhere that uses the word for something else
            return None


def _classes(value: Any, depth: int = 0) -> list[str] | None:
    if not isinstance(value, Mapping) or depth > 3:
        return None
    table = cast("Mapping[Any, Any]", value)
    for key in ("classes", "class_names"):
        names = table.get(key)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in cast("Any", names)):
            return list(cast("Sequence[str]", names))
    for key, flip in (("id2label", False), ("label2id", True), ("class_to_idx", True)):
        pairs = table.get(key)
        if isinstance(pairs, Mapping) and pairs:
            items = [(two, one) if flip else (one, two) for one, two in cast("Mapping[Any, Any]", pairs).items()]
            by_number = {int(number): str(name) for number, name in items if str(number).isdigit()}
            complete = len(by_number) == len(items) and sorted(by_number) == list(range(len(items)))
            if complete and not all(re.fullmatch(r"LABEL_\d+", name) for name in by_number.values()):
                return [by_number[number] for number in sorted(by_number)]
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "args", "config", "model", "lineage"):
        if (found := _classes(table.get(key), depth + 1)) is not None:
            return found
    return None
