"""The sets of weights in a training checkpoint: the raw ones, and averages of any origin.

Averages are found where our callbacks keep them (see `soups.averaging.checkpoint`), where Lightning's WeightAveraging and
StochasticWeightAveraging do, and under the names of timm, torchvision and others (`state_dict_ema`, `model_ema`, an
`AveragedModel`'s state). `open_store(…, state=…)`, `load_averaged`, `soups averages` and `soups export` all ask here.

Everything works on tensors in memory and on records of tensors in a file alike: all that is asked of one is its dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from soups.errors import DataError, did_you_mean
from soups.stores.averages import KEY, plain_name, sources
from soups.stores.inert import TensorRecord

RAW = "raw"
# Where Lightning's WeightAveraging keeps the raw weights; `state_dict` then holds the average.
_LIGHTNING_RAW = "current_model_state"
USUAL = ("", "state_dict", "model_state_dict", "model", "net", "weights")
_FOREIGN = re.compile(r"(?:^|[._])(ema|swa|averaged?|avg)(?:[._]|$)", re.IGNORECASE)


class _HasDtype(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


T = TypeVar("T", bound=_HasDtype)


class Placed(NamedTuple, Generic[T]):
    """A tensor of a set of weights, and the dtype that it has there."""

    tensor: T
    dtype: torch.dtype


@dataclass(frozen=True)
class Average(Generic[T]):
    """One average in a checkpoint.

    Attributes:
        kind: what made it.
        count: of points in it; 0 where that is not recorded.
        tensors: by the names under which they are averaged; what is missing is the raw weights' own.
        content: how the names go with those of the raw weights: see `soups.stores.averages.sources`.
    """

    kind: str
    count: int
    tensors: Mapping[str, T]
    content: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class States(Generic[T]):
    """The weights in a checkpoint.

    Attributes:
        raw: the training weights, by the names of the file.
        step: at which they were saved; 0 where that is not recorded.
        averages: by name.
    """

    raw: Mapping[str, T]
    step: int
    averages: Mapping[str, Average[T]]

    def select(self, name: str, location: str, *, strict: bool = True) -> dict[str, Placed[T]]:
        """Return a whole set of weights: the raw ones, or an average completed from them, in their names and dtypes.

        Args:
            name: of an average; "raw"; or the empty string for the only average.
            location: of the checkpoint, for messages.
            strict: whether every averaged tensor must have its place among the raw weights.

        Raises:
            DataError: there is no such average, or several to choose from.
            WeightsError: an averaged tensor has no place among the raw weights.
        """
        raw = {key: Placed(tensor, tensor.dtype) for key, tensor in self.raw.items()}
        if name == RAW:
            return raw
        if not name and len(self.averages) == 1:
            (name,) = self.averages
        if name not in self.averages:
            which = f"no average called {name!r}" if name else "several averages" if self.averages else "no average"
            why = "" if self.averages else " It was written without an averaging callback, or before the first point."
            hint = did_you_mean(name, [RAW, *self.averages])
            raise DataError(f"{location} holds {which}.{why} {hint[:1].upper()}{hint[1:]}")
        average = self.averages[name]
        if not raw:
            return {key: Placed(tensor, tensor.dtype) for key, tensor in average.tensors.items()}
        places = sources(raw, average.tensors, average.content, where=location, strict=strict)
        return {**raw, **{key: Placed(average.tensors[own], raw[key].dtype) for key, own in places.items()}}


def is_tensor(value: Any) -> bool:
    """Tell whether a value of an object tree is a tensor, in memory or in a file."""
    return isinstance(value, TensorRecord | Tensor)


def tensors_in(value: Any) -> dict[str, Any]:
    """Return the tensors of a map from text, without its other entries."""
    if not isinstance(value, Mapping):
        return {}
    entries = cast("Mapping[Any, Any]", value)
    return {key: item for key, item in entries.items() if isinstance(key, str) and is_tensor(item)}


def tensor_maps(root: Any) -> dict[str, dict[str, Any]]:
    """Find every map from text to tensors in an object tree, by its path: `""` for the root, `"state_dict"`, `"a.b"`.

    A map qualifies when at least half of its entries, and at least one, are tensors; entries of other kinds are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()

    def visit(value: Any, path: str, depth: int) -> None:
        if not isinstance(value, dict) or id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        entries = cast("dict[Any, Any]", value)
        tensors = tensors_in(entries)
        if tensors and 2 * len(tensors) >= len(entries):
            found[path] = tensors
        for key, item in entries.items():
            if isinstance(item, dict):
                visit(item, f"{path}.{key}" if path else str(key), depth + 1)

    visit(root, "", 0)
    return {path: tensors for path, tensors in found.items() if "optimizer" not in path.lower()}


def read_states(
    root: Any, maps: Mapping[str, Mapping[str, Any]] | None = None, number: Callable[[Any], int] = int
) -> States[Any]:
    """Find the raw weights and the averages in a checkpoint's object tree.

    Args:
        root: what the file holds.
        maps: `tensor_maps(root)`, if it is known.
        number: how to read a tensor of one element.
    """
    maps = tensor_maps(root) if maps is None else maps
    entries = cast("Mapping[Any, Any]", root) if isinstance(root, Mapping) else {}
    raw = next((maps[name] for name in USUAL if name in maps), {})
    averages: dict[str, Average[Any]] = {}
    if _LIGHTNING_RAW in maps:
        state = entries.get("averaging_state")
        count = _count(state, number)
        if count or state is None:
            average = {plain_name(name): tensor for name, tensor in raw.items() if _averaged(tensor)}
            averages["ema"] = Average("Lightning", count, average)
        raw = maps[_LIGHTNING_RAW]
    theirs = averages.pop("ema", None)
    averages |= _ours(entries.get(KEY))
    if theirs is not None:
        averages["ema" if "ema" not in averages else "lightning"] = theirs
    averages |= _lightning_swa(entries.get("callbacks"), number)
    for path, tensors in maps.items():
        mark = _FOREIGN.search(path)
        if mark is None or tensors is raw or path.startswith((KEY, "callbacks.")):
            continue
        name = mark[1].lower() if mark[1].lower() in ("ema", "swa") else "average"
        averages[name if name not in averages else path] = _foreign(tensors, raw, number)
    step = entries.get("global_step", 0)
    return States(raw, step if isinstance(step, int) else 0, averages)


def _averaged(tensor: Any) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _count(state: Any, number: Callable[[Any], int]) -> int:
    """Return how many points an `AveragedModel` counts, or 0 where it does not say."""
    value = cast("Mapping[str, Any]", state).get("n_averaged") if isinstance(state, Mapping) else None
    return value if isinstance(value, int) else number(value) if is_tensor(value) else 0


def _ours(content: Any) -> dict[str, Average[Any]]:
    if not isinstance(content, Mapping):
        return {}
    kept = cast("Mapping[str, Any]", content)
    return {
        name: Average(
            str(entry.get("kind", "")),
            int(entry.get("count", 0)),
            {
                key: tensor
                for part in ("weights", "buffers", "saved")
                for key, tensor in tensors_in(entry.get(part)).items()
            },
            kept,
        )
        for name, entry in cast("Mapping[str, Any]", kept.get("averages") or {}).items()
        if isinstance(entry, Mapping)
    }


def _lightning_swa(callbacks: Any, number: Callable[[Any], int]) -> dict[str, Average[Any]]:
    found: dict[str, Average[Any]] = {}
    for key, state in cast("Mapping[Any, Any]", callbacks).items() if isinstance(callbacks, Mapping) else ():
        tensors = tensors_in(state.get("average_model_state")) if isinstance(state, Mapping) else {}
        if tensors and str(key).startswith("StochasticWeightAveraging"):
            average = {plain_name(name): tensor for name, tensor in tensors.items() if _averaged(tensor)}
            found["swa"] = Average("Lightning SWA", _count(state, number), average)
    return found


def _foreign(tensors: Mapping[str, Any], raw: Mapping[str, Any], number: Callable[[Any], int]) -> Average[Any]:
    wrapped = "n_averaged" in tensors and any(name.startswith("module.") for name in tensors)
    names = {plain_name(name) for name in raw}
    plain = {plain_name(name): tensor for name, tensor in tensors.items() if name != "n_averaged" or not wrapped}
    if wrapped or (not names & set(plain) and all(name.startswith("module.") for name in plain)):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return Average("AveragedModel" if wrapped else "average", _count(tensors, number), plain)
