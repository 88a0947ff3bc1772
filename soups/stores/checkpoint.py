"""Torch and Lightning checkpoints as stores: which of the weights in the file, and under which names."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor

from soups.errors import StorageError, WeightsError, did_you_mean
from soups.stores.averages import plain_name
from soups.stores.inert import Opaque, TensorRecord, opaque_parts
from soups.stores.states import RAW, USUAL, Placed, States, read_states, tensor_maps
from soups.stores.store import Extent, ExtentStore, TensorMeta
from soups.stores.torch_zip import TorchArchive


class NoWeightsError(StorageError):
    """A torch file that is whole and holds no weights: training arguments, results, a pickled module."""


class TorchStore(ExtentStore):
    """The weights in one torch file: a plain state dict, or one of the sets of weights in a training checkpoint.

    Args:
        path: the file or URL.
        state: which weights. `None` takes the model's own: the root if that is a state dict, else `state_dict`, else
            another usual name. `"raw"` takes the weights under training, `"average"` the only average in the file,
            `"average:NAME"` the one of that name (completed from the raw weights, in their dtypes), and any other text a
            path such as `"generator.state_dict"`.
        strict: whether every tensor of an average must have its place among the raw weights.
        plain: leave what `torch.compile` and distributed wrappers put into names out of them.

    Attributes:
        states: the paths of all state dicts in the file.
        averages: the raw weights and the averages in the file.
        skipped: what was not loaded, because only code could make it: path and class.

    Raises:
        StorageError: see `TorchArchive`; or the file has no such state.
        DataError: the file has no such average.
    """

    def __init__(
        self, path: str | os.PathLike[str], state: str | None = None, *, plain: bool = True, strict: bool = True
    ) -> None:
        archive = TorchArchive(path)
        self.location = archive.source.location
        self._archive = archive
        try:
            self._maps = tensor_maps(archive.root)
            self.states = list(self._maps)
            self.averages: States[TensorRecord] = read_states(
                archive.root, self._maps, lambda record: int(archive.read(record))
            )
            self.skipped = dict(opaque_parts(archive.root))
            extents: dict[str, Extent] = {}
            tied: dict[str, str] = {}
            first: dict[Placed[TensorRecord], str] = {}
            self._indirect: dict[str, Placed[TensorRecord]] = {}
            for given, placed in self._select(state, strict).items():
                name = plain_name(given) if plain else given
                record, dtype = placed
                offset = archive.place(record)
                if placed in first and record.span:
                    tied[name] = first[placed]
                    continue
                first[placed] = name
                extents[name] = Extent(archive.source, offset, TensorMeta(record.shape, dtype))
                if not record.direct or record.dtype != dtype:
                    self._indirect[name] = placed
        except BaseException:
            archive.close()
            raise
        super().__init__(extents, tied)

    def _select(self, state: str | None, strict: bool) -> Mapping[str, Placed[TensorRecord]]:
        if state == RAW and self.averages.raw:
            return self.averages.select(RAW, self.location)
        if state == "average" or (state or "").startswith("average:"):
            return self.averages.select((state or "").partition(":")[2], self.location, strict=strict)
        if state is None or state == RAW:
            path, what = next((name for name in USUAL if name in self._maps), None), "the model's weights"
            if path is None:
                raise NoWeightsError(
                    f"{self.location} has no weights under a usual name: it has {self._listing()}.{self._not_loaded()}"
                )
        else:
            path, what = state, f"state {state!r}"
        return {name: Placed(record, record.dtype) for name, record in self._named(path, what).items()}

    def _named(self, path: str, what: str) -> Mapping[str, TensorRecord]:
        if path not in self._maps:
            hint = did_you_mean(path, [*self._maps, "average", RAW])
            raise StorageError(f"{self.location} has no {what}: {hint}{self._not_loaded()}")
        raw: Any = self._archive.root
        for part in path.split(".") if path else []:
            raw = raw[part] if isinstance(raw, dict) and part in raw else {}
        for name, value in cast("dict[Any, Any]", raw).items():
            # Extra state is a module's own affair, and no tensor of the model's.
            if isinstance(value, Opaque) and not str(name).endswith("_extra_state") and not self._is_beside(path, name):
                raise StorageError(
                    f"{self.location}: {name!r} among {what} is no plain tensor ({value}). Loading it would run code from "
                    f"the file; save the weights again as plain tensors."
                )
        return self._maps[path]

    def _is_beside(self, path: str, name: Any) -> bool:
        """Tell whether an entry of the root lies beside weights rather than among them: its name is no tensor's."""
        return path == "" and "." not in str(name) and any("." in key for key in self._maps[path])

    def _not_loaded(self) -> str:
        modules = [
            f"{place or 'the whole file'} ({value.name})"
            for place, value in _opaques(self._archive.root)
            if value.is_module
        ]
        if modules:
            return (
                f" It holds pickled modules: {', '.join(modules[:3])}. They are not loaded, because that would run their "
                f"code; where they were made, save `module.state_dict()` instead."
            )
        if self.skipped:
            names = [f"{place or 'the whole file'} ({name})" for place, name in list(self.skipped.items())[:3]]
            return f" It holds objects that are not loaded, because that would run their code: {', '.join(names)}."
        return ""

    def _listing(self) -> str:
        return ", ".join(repr(name) if name else "'' (the whole file)" for name in self._maps) or "no tensors by name"

    @property
    def root(self) -> Any:
        """The file's object tree, tensors as records."""
        return self._archive.root

    @property
    def indirect(self) -> Collection[str]:
        """Names of the tensors whose bytes in the file are not their own: strided, conjugate, negative, or converted."""
        return self._indirect.keys()

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of a tensor; one that was saved as a view of others is read whole first."""
        placed = self._indirect.get(self._tied.get(key, key))
        if placed is None:
            return super().read_flat(key, start, stop, out)
        record, dtype = placed
        source, offset, meta = self.extent(key)
        if record.direct:
            stop = meta.numel if stop is None else stop
            elements = source.read_tensor(offset + start * record.dtype.itemsize, record.dtype, stop - start)
            return elements.to(dtype)
        return self._archive.read(record).reshape(-1)[start:stop].to(dtype)

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Ask the system to read ahead."""
        if self._tied.get(key, key) not in self._indirect:
            super().will_need(key, start, stop)

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


def _opaques(value: Any, path: str = "", depth: int = 0) -> list[tuple[str, Opaque]]:
    if isinstance(value, Opaque):
        return [(path, value)]
    if depth > 4 or not isinstance(value, dict):
        return []
    items = list(cast("dict[Any, Any]", value).items())[:1000]
    return [found for key, item in items for found in _opaques(item, f"{path}.{key}" if path else str(key), depth + 1)]


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
