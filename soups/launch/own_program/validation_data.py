"""A digest of the data that a program validates on, taken from the batches as they pass by.

Metrics choose a soup only if they were measured on the same data. The digest holds the number of samples, hashes of the
first batches, and the configuration's data section. Nothing is read twice: a callback of the evaluating trainer, or of the
fit itself, looks at the batches that validation reads anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import RandomSampler

from soups.stores.files import fingerprint

# Batches of each loader that are hashed, and elements of a tensor in a batch: a large one is sampled at even distances.
_BATCHES, _ELEMENTS = 8, 1 << 16
# What sections are called that describe data.
_SECTIONS = ("data", "datamodule", "dataset", "datasets", "dataloader", "dataloaders")


class ValidationData(BaseModel):
    """The data that a metric was measured on.

    Attributes:
        samples: number of samples of each loader's dataset; None where it has no length.
        batches: hashes of the first batches of each loader in their order; empty where the order is random.
        forms: shapes and dtypes of those batches, hashed: only batches of one form can be compared.
        section: hash of the configuration's data sections, without keys that the sweep varies.
    """

    model_config = ConfigDict(extra="forbid")

    samples: list[int | None]
    batches: list[list[str]]
    forms: list[list[str]]
    section: str = ""

    @property
    def digest(self) -> str:
        """One hash of all of it."""
        return fingerprint(self.model_dump(mode="json"))

    def differs(self, other: ValidationData) -> str:
        """Return how other data differ, or "" where nothing speaks against their being the same.

        Batches are compared as far as both have them in one form: another batch size cuts the same data otherwise.
        """
        if self.samples != other.samples:
            return f"{_counts(other.samples)} samples there, {_counts(self.samples)} here"
        compared = False
        for own, theirs, form, their_form in zip(self.batches, other.batches, self.forms, other.forms, strict=False):
            count = min(len(own), len(theirs))
            if count and form[:count] == their_form[:count]:
                compared = True
                if own[:count] != theirs[:count]:
                    return "their contents differ"
        if not compared and self.section != other.section:
            return "the data section of the configuration differs"
        return ""


def _counts(samples: Sequence[int | None]) -> str:
    return " + ".join("an unknown number of" if count is None else str(count) for count in samples) or "no"


def data_section(config: Mapping[str, Any], varied: Sequence[str]) -> str:
    """Return a hash of the sections of a configuration that describe data, without keys that the sweep varies."""
    found = {name: config[name] for name in _SECTIONS if name in config}
    flat = {key: value for key, value in _flat(found) if not any(key == v or key.startswith(f"{v}.") for v in varied)}
    return fingerprint(flat) if flat else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Observer:
    """Hashes the first validation batches of one pass; works as a callback's helper for either package.

    Attributes:
        batches, forms: as in `ValidationData`, by the loader's number.
    """

    def __init__(self) -> None:
        self.batches: dict[int, list[str]] = {}
        self.forms: dict[int, list[str]] = {}

    def see(self, batch: Any, loader: int) -> None:
        """Hash a batch, if it is among the first of its loader."""
        seen, forms = self.batches.setdefault(loader, []), self.forms.setdefault(loader, [])
        if len(seen) < _BATCHES:
            content, form = _hashes(batch)
            seen.append(content)
            forms.append(form)

    def found(self, loaders: Any, section: str) -> ValidationData:
        """Return the digest.

        Args:
            loaders: of the trainer, after the pass.
            section: see `data_section`.
        """
        flat = _flattened(loaders)
        samples = [_length(loader) for loader in flat]
        numbers = range(max(len(flat), len(self.batches)))
        shuffled = [number < len(flat) and _is_shuffled(flat[number]) for number in numbers]
        return ValidationData(
            samples=samples,
            batches=[[] if shuffled[number] else self.batches.get(number, []) for number in numbers],
            forms=[[] if shuffled[number] else self.forms.get(number, []) for number in numbers],
            section=section,
        )


def _flattened(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return [one for value in cast(Mapping[str, Any], loaders).values() for one in _flattened(value)]
    if isinstance(loaders, (list, tuple)):
        return [one for value in cast(list[Any], loaders) for one in _flattened(value)]
    return [loaders]


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _is_shuffled(loader: Any) -> bool:
    batches = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    return any(isinstance(sampler, RandomSampler) for sampler in samplers)


def _hashes(batch: Any) -> tuple[str, str]:
    """Return hashes of a batch's content, and of its shapes and dtypes."""
    content, form = hashlib.sha256(), hashlib.sha256()
    for name, leaf in _batch_leaves(batch):
        if isinstance(leaf, Tensor):
            form.update(json.dumps([name, list(leaf.shape), str(leaf.dtype)]).encode())
            content.update(_sampled(leaf))
        else:
            form.update(json.dumps([name, type(leaf).__name__]).encode())
            content.update(repr(leaf).encode())
    return content.hexdigest()[:16], form.hexdigest()[:16]


def _sampled(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, of elements at even distances where there are many."""
    whole = tensor.detach()
    if whole.layout != torch.strided:
        whole = whole.to_dense()
    flat = whole.reshape(-1)
    part = flat[:: max(1, -(-flat.numel() // _ELEMENTS))].cpu().contiguous()
    return part.view(torch.uint8).numpy().tobytes() if part.numel() else b""


def _batch_leaves(batch: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values of a batch of any kind: mappings, sequences, and objects with attributes."""
    if isinstance(batch, (Tensor, str, bytes, bool, int, float)) or batch is None:
        yield name, batch
    elif isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        yield name, torch.from_numpy(np.ascontiguousarray(batch))
    elif isinstance(batch, Mapping):
        for key, value in cast(Mapping[Any, Any], batch).items():
            yield from _batch_leaves(value, f"{name}.{key}", depth + 1)
    elif isinstance(batch, (list, tuple)):
        for number, value in enumerate(cast(list[Any], batch)):
            yield from _batch_leaves(value, f"{name}.{number}", depth + 1)
    elif depth < 8 and hasattr(batch, "__dict__"):
        for key, value in sorted(vars(batch).items()):
            yield from _batch_leaves(value, f"{name}.{key}", depth + 1)
