"""Averages inside checkpoints: list them, load one as a full state dict, write one to a file of its own.

A checkpoint written under our callbacks keeps the raw training weights in `state_dict`, so that every other tool resumes it
exactly, and all averages under the one key `weight_averages`:

    {"version": 2, "step": …, "places": {key of state_dict: name}, "tied": {name: first name},
     "averages": {"ema": {"kind": "EMA", "count": …, "weights": {name: tensor}, "state": {…}}, …}}

`state` is what an exact resume needs and is absent from weights-only checkpoints. Checkpoints of Lightning's own
WeightAveraging callbacks, where the average is `state_dict` and the raw weights are elsewhere, are read as well.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError, DataError, StorageError, did_you_mean
from soups.stores.averages import KEY, plain_name, sources
from soups.stores.files import replacing, storage_errors
from soups.stores.safetensors import write_safetensors

VERSION = 2
RAW = "raw"
# Where averages lie among the tensors of a distributed (sharded) checkpoint.
SHARDED_PREFIX = f"{KEY}/"


@dataclass(frozen=True)
class AverageInfo:
    """One line of `averages`."""

    name: str
    kind: str
    count: int
    tensors: int


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: a file, or the folder of a distributed checkpoint. Nothing in it is executed.

    Raises:
        StorageError: the file is absent, damaged, or holds objects other than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _read_distributed(path)
    if not path.exists():
        raise StorageError(f"There is no checkpoint {path}. Check the path; has the run that writes it saved yet?")
    try:
        with storage_errors(path, "read"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise StorageError(
            f"{path} holds objects other than tensors and plain values, which are not loaded since they could run code "
            f"({str(error).splitlines()[0]}). Save hyperparameters as plain values, for instance with "
            f"OmegaConf.to_container(config)."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise StorageError(
            f"{path} is not a whole torch checkpoint ({str(error).splitlines()[0]}). It may have been cut off while it "
            f"was written or copied; use another checkpoint of the run."
        ) from error
    if not isinstance(checkpoint, dict):
        raise StorageError(f"{path} holds a {type(checkpoint).__name__} instead of a checkpoint dictionary.")
    return checkpoint


def _read_distributed(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (path / ".metadata").exists():
        raise StorageError(f"{path} is a folder without a distributed checkpoint in it (no .metadata). Check the path.")
    checkpoint: dict[str, Any] = {}
    if (path / "meta.pt").exists():
        checkpoint = read_checkpoint(path / "meta.pt")
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith("state_dict.")
    }
    load(wanted, checkpoint_id=path, no_dist=True)
    tensors = {key.removeprefix("state_dict."): tensor for key, tensor in wanted.items()}
    checkpoint["state_dict"] = {key: t for key, t in tensors.items() if not key.startswith(SHARDED_PREFIX)}
    for name, entry in checkpoint.get(KEY, {}).get("averages", {}).items():
        start = f"{SHARDED_PREFIX}{name}/mean/"
        entry["weights"] = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
    return checkpoint


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
    checkpoint = read_checkpoint(path)
    adopt_lightning(checkpoint)
    rows = [
        AverageInfo(RAW, "training weights", int(checkpoint.get("global_step", 0)), len(_state_dict(checkpoint, path)))
    ]
    for name, entry in checkpoint.get(KEY, {}).get("averages", {}).items():
        rows.append(AverageInfo(name, entry["kind"], int(entry["count"]), len(entry["weights"])))
    return rows


def load_averaged(path: str | Path, which: str = "ema", *, strict: bool = True) -> dict[str, Tensor]:
    """Return one average of a checkpoint as a full state dict, which the module loads strictly.

    Keys are those of the checkpoint's `state_dict`, whatever hooks of the module made of them.

    Averaged tensors come in the dtypes of the raw weights; whatever is not averaged (integer buffers, frozen parameters,
    buffers under `buffers="live"`) is the raw weights' own.

    Args:
        path: a Lightning checkpoint, or the folder of a distributed one.
        which: the average's name, or "raw".
        strict: whether every averaged tensor must have its place in `state_dict`. False leaves out those that a hook of
            the module has dropped.

    Raises:
        StorageError: the checkpoint cannot be read.
        DataError: it holds no such average; the message lists those it holds.
        WeightsError: an averaged tensor is not in `state_dict`, where the raw weights would stand in for it.
    """
    checkpoint = read_checkpoint(path)
    adopt_lightning(checkpoint)
    raw = _state_dict(checkpoint, path)
    if which == RAW:
        return dict(raw)
    held = checkpoint.get(KEY, {}).get("averages", {})
    if which not in held:
        hint = did_you_mean(which, [RAW, *held])
        why = "" if held else " It was written without an averaging callback, or before the first point was taken."
        raise DataError(f"{path} holds no average called {which!r}.{why} {hint[:1].upper()}{hint[1:]}")
    entry = held[which]
    average = {**entry["weights"], **entry.get("buffers", {}), **entry.get("saved", {})}
    return overlay(raw, average, sources(raw, average, checkpoint[KEY], where=str(path), strict=strict))


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

    `.ckpt` is a minimal Lightning checkpoint: `state_dict` and the hyperparameters of the original.

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
    weights = {plain_name(name): tensor for name, tensor in load_averaged(path, which).items()}
    if target.suffix == ".safetensors":
        write_safetensors(target, weights, {"soups.average": which, "soups.source": Path(path).name})
        return target
    # mmap'd tensors are copied, so that the file does not repeat the storage they are cut from
    content: dict[str, Any] = _clone(weights)
    if target.suffix == ".ckpt":
        original = read_checkpoint(path)
        keep = ("hyper_parameters", "hparams_name", "datamodule_hyper_parameters", "epoch", "global_step")
        content = {
            "state_dict": content,
            "pytorch-lightning_version": original.get("pytorch-lightning_version", "2.6.4"),
        }
        content |= {key: original[key] for key in keep if key in original}
    with replacing(target) as temporary:
        torch.save(content, temporary)
    return target


def _clone(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    copies: dict[int, Tensor] = {}
    return {name: copies.setdefault(id(tensor), tensor.clone()) for name, tensor in weights.items()}


def _state_dict(checkpoint: Mapping[str, Any], path: str | Path) -> Mapping[str, Tensor]:
    if "state_dict" not in checkpoint:
        raise StorageError(
            f"{path} has no 'state_dict': it is not a Lightning checkpoint. It holds: {list(checkpoint)[:8]}."
        )
    return checkpoint["state_dict"]
