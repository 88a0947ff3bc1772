"""Averages inside checkpoints: list them, load one as a full state dict, write one to a file of its own.

A checkpoint written under our callbacks keeps the raw training weights in `state_dict`, so that every other tool resumes it
exactly, and all averages under the one key `weight_averages`:

    {"version": 2, "step": …, "places": {key of state_dict: name}, "tied": {name: first name},
     "averages": {"ema": {"kind": "EMA", "count": …, "weights": {name: tensor}, "state": {…}}, …}}

`state` is what an exact resume needs and is absent from weights-only checkpoints. Checkpoints of Lightning's own
WeightAveraging callbacks, where the average is `state_dict` and the raw weights are elsewhere, are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.stores.averages import KEY, plain_name
from soups.stores.checkpoint import TorchStore
from soups.stores.distributed import SHARDED_PREFIX as SHARDED_PREFIX
from soups.stores.distributed import DistributedStore, is_distributed
from soups.stores.files import replacing
from soups.stores.opening import open_store
from soups.stores.states import RAW
from soups.stores.store import Store
from soups.stores.torch_writer import plain_parts
from soups.stores.writer import write_safetensors

VERSION = 2


@dataclass(frozen=True)
class AverageInfo:
    """One line of `averages`."""

    name: str
    kind: str
    count: int
    tensors: int


def adopt_lightning(checkpoint: dict[str, Any]) -> bool:
    """Turn a checkpoint of Lightning's WeightAveraging callbacks, in memory, into one of ours; tell whether it was one.

    Lightning (2.6) puts the average into `state_dict` and the raw weights under `current_model_state`. The average is
    called "ema" here, whatever its averaging function was, and "lightning" if one of ours has that name.
    """
    if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
        return False
    average, raw = checkpoint["state_dict"], checkpoint.pop("current_model_state")
    count = int(checkpoint["averaging_state"].get("n_averaged", 0))
    weights = {plain_name(name): tensor for name, tensor in average.items() if tensor.is_floating_point()}
    entry = {"kind": "Lightning", "count": count, "weights": weights, "buffers": {}}
    checkpoint["state_dict"] = raw
    ours = checkpoint.get(KEY)
    if ours is not None:  # both kinds of callback on one Trainer
        if count:
            ours["averages"]["ema" if "ema" not in ours["averages"] else "lightning"] = entry
        return True
    checkpoint[KEY] = {
        "version": VERSION,
        "step": int(checkpoint.get("global_step", count)),
        "tied": {},
        "averages": {"ema": entry} if count else {},
    }
    return True


def averages(path: str | Path) -> list[AverageInfo]:
    """List the averages in a checkpoint, its raw weights first.

    Raises:
        StorageError: the checkpoint cannot be read.
    """
    with _opened(path, RAW) as store:
        if not isinstance(store, TorchStore | DistributedStore):
            return [AverageInfo(RAW, "weights", 0, len(store.keys()))]
        states = store.averages
    rows = [AverageInfo(RAW, "training weights", states.step, len(states.raw))]
    for name, average in states.averages.items():
        rows.append(AverageInfo(name, average.kind, average.count, len(average.tensors)))
    return rows


def load_averaged(path: str | Path, which: str = "ema", *, strict: bool = True) -> dict[str, Tensor]:
    """Return one average of a checkpoint as a full state dict, which the module loads strictly.

    Keys are those of the checkpoint's `state_dict`, whatever hooks of the module made of them.

    Averaged tensors come in the dtypes of the raw weights; whatever is not averaged (integer buffers, frozen parameters,
    buffers under `buffers="live"`) is the raw weights' own. Hyperparameters and other objects in the file are not loaded, and
    nothing in it is run.

    Args:
        path: a checkpoint of Lightning or another program, or the folder of a distributed one.
        which: the average's name, or "raw".
        strict: whether every averaged tensor must have its place in `state_dict`. False leaves out those that a hook of
            the module has dropped.

    Raises:
        StorageError: the checkpoint cannot be read.
        DataError: it holds no such average; the message lists those it holds.
        WeightsError: an averaged tensor is not in `state_dict`, where the raw weights would stand in for it.
    """
    with _opened(path, which, strict=strict) as store:
        return store.load()


def _opened(path: str | Path, which: str, *, strict: bool = True) -> Store:
    state = RAW if which == RAW else f"average:{which}"
    if is_distributed(Path(path)):
        return DistributedStore(path, state, plain=False, strict=strict)
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":  # one set of weights, and no average of it
        return open_store(path, state=None if which == RAW else state)
    return TorchStore(path, state, plain=False, strict=strict)


def overlay(raw: Mapping[str, Tensor], average: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Return `raw` with the averaged tensors in place of its own; tied names share one tensor.

    Args:
        raw: a full state dict; its names, order and dtypes are kept.
        average: by the names under which tensors are averaged.
        places: key of `raw` to name in `average`, as `soups.stores.averages.sources` returns it.
    """
    made: dict[tuple[str, torch.dtype], Tensor] = {}
    result: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        if key not in places:
            result[key] = tensor
            continue
        kind = places[key], tensor.dtype
        if kind not in made:
            made[kind] = average[places[key]].detach().to(tensor.device, tensor.dtype)
        result[key] = made[kind]
    return result


def export(path: str | Path, which: str, to: str | Path) -> Path:
    """Write one average of a checkpoint to a file of its own, with plain names; `.safetensors`, `.pt` or `.ckpt`.

    `.ckpt` is a minimal Lightning checkpoint: `state_dict` and the plain hyperparameters of the original.

    Args:
        path: the checkpoint.
        which: the average's name, or "raw".
        to: the file to write, atomically.

    Raises:
        StorageError: a file cannot be read or written.
        DataError: the checkpoint holds no such average.
        ConfigError: the ending of `to` is none of the three.
    """
    target = Path(to)
    if target.suffix not in (".safetensors", ".pt", ".ckpt"):
        raise ConfigError(f"{target} must end in .safetensors, .pt or .ckpt, which says what kind of file is written.")
    with _opened(path, which) as store:
        weights = {plain_name(name): tensor for name, tensor in store.load().items()}
        beside = plain_parts(store.root) if isinstance(store, TorchStore) else {}
    if target.suffix == ".safetensors":
        write_safetensors(target, weights, {"soups.average": which, "soups.source": Path(path).name})
        return target
    content: dict[str, Any] = _clone(weights)
    if target.suffix == ".ckpt":
        keep = ("hyper_parameters", "hparams_name", "datamodule_hyper_parameters", "epoch", "global_step")
        version = beside.get("pytorch-lightning_version", "2.6.4")
        content = {"state_dict": content, "pytorch-lightning_version": version}
        content |= {key: beside[key] for key in keep if key in beside}
    with replacing(target) as temporary:
        torch.save(content, temporary)
    return target


def _clone(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    copies: dict[int, Tensor] = {}
    return {name: copies.setdefault(id(tensor), tensor.clone()) for name, tensor in weights.items()}
