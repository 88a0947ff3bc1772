"""Torch and Lightning checkpoints as stores: which of the weights in the file, and under which names."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from soups.errors import StorageError, WeightsError, did_you_mean
from soups.stores.store import Extent, ExtentStore, TensorMeta
from soups.stores.torch_zip import Opaque, TensorRecord, TorchArchive, tensor_maps

# Where our averaging callbacks keep their averages, one map a name, inside a Lightning checkpoint.
AVERAGES = "weight_averages"
# Where Lightning's own WeightAveraging keeps the live weights; `state_dict` then holds the average.
LIVE = "current_model_state"
_USUAL = ("", "state_dict", "model_state_dict", "model", "net", "weights")


class TorchStore(ExtentStore):
    """The weights in one torch archive: a plain state dict, or one of the states in a training checkpoint.

    Args:
        path: the file or URL.
        state: which weights. `None` takes the model's own: the root if that is a state dict, else `state_dict`, else
            another usual name. `"average"` takes the only average in it, `"average:NAME"` the one of that name
            (averages that lack some tensors, buffers say, are completed from `state_dict`), `"live"` the weights being
            trained where Lightning's `WeightAveraging` swapped them, and any other text a path such as `"state_dict_ema"`.

    Attributes:
        states: the paths of all state dicts in the file.

    Raises:
        StorageError: see `TorchArchive`; or the file has no such state.
    """

    def __init__(self, path: str | os.PathLike[str], state: str | None = None) -> None:
        archive = TorchArchive(path)
        self.location = archive.source.location
        self._archive = archive
        try:
            self._maps = {
                name: records for name, records in tensor_maps(archive.root).items() if "optimizer" not in name.lower()
            }
            self.states = list(self._maps)
            records = self._select(state)
            extents: dict[str, Extent] = {}
            tied: dict[str, str] = {}
            first: dict[TensorRecord, str] = {}
            self._strided: dict[str, TensorRecord] = {}
            for name, record in records.items():
                name = name.replace("_orig_mod.", "")  # torch.compile's wrapper is no part of the model
                offset = archive.place(record)
                if record in first and record.span:
                    tied[name] = first[record]
                    continue
                first[record] = name
                extents[name] = Extent(archive.source, offset, record.meta)
                if not record.contiguous:
                    self._strided[name] = record
        except BaseException:
            archive.close()
            raise
        super().__init__(extents, tied)

    def _select(self, state: str | None) -> Mapping[str, TensorRecord]:
        if state is None:
            return self._named(next((name for name in _USUAL if name in self._maps), None), "the model's weights")
        if state == "live":
            return self._named(LIVE if LIVE in self._maps else "state_dict", "live weights")
        if state == "average" or state.startswith("average:"):
            return self._average(state.partition(":")[2])
        return self._named(state, f"state {state!r}")

    def _average(self, name: str) -> Mapping[str, TensorRecord]:
        ours = {path: records for path, records in self._maps.items() if path.startswith(f"{AVERAGES}.")}
        # Beside an average's weights lies what its callback needs to go on.
        ours = {path: records for path, records in ours.items() if path.endswith(".weights")} or ours
        if name:
            homes = (AVERAGES, f"{AVERAGES}.averages")
            wanted = {f"{home}.{name}{ending}" for home in homes for ending in ("", ".weights")}
            ours = {path: records for path, records in ours.items() if path in wanted}
        elif not ours and LIVE in self._maps:
            return self._maps["state_dict"]
        if not ours and not name and "state_dict_ema" in self._maps:
            return self._maps["state_dict_ema"]
        if len(ours) != 1:
            which = f"no average called {name!r}" if name else "no average" if not ours else "several averages"
            raise StorageError(
                f"{self.location} holds {which}. Its weights are {self._listing()}; name one, as in state='average:NAME'."
            )
        (average,) = ours.values()
        whole = self._maps.get("state_dict", {})
        if not set(average) <= set(whole):
            return average
        # A tied name that the average leaves out is the average's tensor, not the live one.
        heirs = {whole[name]: record for name, record in average.items()}
        return {name: average.get(name, heirs.get(record, record)) for name, record in whole.items()}

    def _named(self, path: str | None, what: str) -> Mapping[str, TensorRecord]:
        if path is None or path not in self._maps:
            found = _opaque(self._archive.root)
            note = (
                f" It holds objects that are not loaded, because that would run their code: {found[:3]}."
                if found
                else ""
            )
            hint = did_you_mean(path, [*self._maps, "average", "live"]) if path else f"It has {self._listing()}."
            raise StorageError(f"{self.location} has no {what}: {hint}{note}")
        raw: Any = self._archive.root
        for part in path.split(".") if path else []:
            raw = raw[part] if isinstance(raw, dict) and part in raw else {}
        for name, value in cast("dict[Any, Any]", raw).items():
            if isinstance(value, Opaque):
                raise StorageError(
                    f"{self.location}: {name!r} among {what} is no plain tensor ({value}). Loading it would run code from "
                    f"the file; save the weights again as plain tensors."
                )
        return self._maps[path]

    def _listing(self) -> str:
        return ", ".join(repr(name) if name else "'' (the whole file)" for name in self._maps) or "no tensors by name"

    @property
    def root(self) -> Any:
        """The file's object tree, tensors as records."""
        return self._archive.root

    @property
    def strided(self) -> Collection[str]:
        """Names of the tensors that were saved as strided views."""
        return self._strided.keys()

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of a tensor; one that was saved as a strided view is read whole first."""
        record = self._strided.get(self._tied.get(key, key))
        if record is None:
            return super().read_flat(key, start, stop, out)
        extent = self.extent(key)
        span = extent.source.read_tensor(extent.offset, record.dtype, record.span)
        return torch.as_strided(span, record.shape, record.stride).reshape(-1)[start:stop]

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


def _opaque(root: Any, depth: int = 0) -> list[str]:
    if isinstance(root, Opaque):
        return [root.name]
    if depth > 4 or not isinstance(root, dict | list | tuple):
        return []
    values = list(cast("dict[Any, Any]", root).values()) if isinstance(root, dict) else list(cast("list[Any]", root))
    return [name for value in values[:1000] for name in _opaque(value, depth + 1)]


def strip_prefix(keys: list[str], prefix: str, location: str) -> dict[str, str | None]:
    """Map names to the ones without `prefix`; names that lack it map to `None` and are left out.

    >>> strip_prefix(["model.a", "loss.b"], "model.", "x.ckpt")
    {'model.a': 'a', 'loss.b': None}

    Raises:
        WeightsError: no name has the prefix.
    """
    if not any(key.startswith(prefix) for key in keys):
        raise WeightsError(f"{location} has no tensor whose name begins with {prefix!r}; its first are {keys[:4]}.")
    return {key: key.removeprefix(prefix) if key.startswith(prefix) else None for key in keys}


def describe(meta: TensorMeta) -> str:
    """Return a tensor's kind for people: `bfloat16 (32, 64)`."""
    return f"{str(meta.dtype).removeprefix('torch.')} {tuple(meta.shape)}"
