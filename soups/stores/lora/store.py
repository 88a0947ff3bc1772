"""A PEFT LoRA adapter applied to a base model, tensor by tensor."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from soups.stores.lora.config import read_config
from soups.stores.lora.contents import read_contents
from soups.stores.lora.files import open_adapter
from soups.stores.lora.targets import Targets
from soups.stores.names import Renames
from soups.stores.store import Store, TensorMeta
from soups.stores.views import RenamedStore, StoreView


class LoRAStore(StoreView):
    """A base model's store with an adapter merged in while reading: what PEFT's `merge_and_unload` gives.

    LoRA, rsLoRA, DoRA, PiSSA and OLoRA on linear layers, Conv1D, convolutions, embeddings, attention modules and stacked
    experts; ranks and alphas by pattern; biases, rows and modules that were trained in full. A tensor that the adapter
    changes is computed whole and kept until another one is asked for; others are read as they are.

    Args:
        base: the model that the adapter was trained on; closed with this store.
        adapter: the adapter's folder (`adapter_config.json` and `adapter_model.safetensors` or `.bin`).
        rename: regular expressions and replacements for the adapter's names, where the base has others.

    Attributes:
        own: names that the base ties to another tensor or does not have, and that the adapter gives a tensor of their own.

    Raises:
        StorageError: the folder is no LoRA adapter, or one of a kind that fixed weights cannot express.
        WeightsError: the adapter's tensors do not fit the base.
    """

    def __init__(
        self, base: Store, adapter: str | os.PathLike[str], *, rename: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(base)
        folder = Path(adapter)
        renames = Renames(rename or {})
        opened: Store = open_adapter(folder)
        self._adapter = RenamedStore(opened, renames) if renames.table else opened
        self.location = f"{base.location}+{adapter}"
        self._lock = threading.Lock()
        self._kept: tuple[str, Tensor] | None = None
        try:
            self._config = read_config(folder)
            contents = read_contents(self._adapter, self._adapter.location)
            targets = Targets(base, self._adapter, contents, self._config)
            self._changes = {name: tuple(changes) for name, changes in targets.changes.items() if changes}
            self.own = targets.own
            self._copies = {name: first for name, first in targets.copies.items() if name not in targets.changes}
            self.own = self.own | set(self._copies)
            self._metas = {name: base.meta(first) for name, first in self._copies.items()}
            self._metas |= {name: self._meta_of(name) for name in self._changes}
        except BaseException:
            self._adapter.close()
            raise

    def _meta_of(self, name: str) -> TensorMeta:
        known = name in set(self.store)
        first = self._changes[name][0].tensors[0]
        shape, dtype = self.store.meta(name) if known else self._adapter.meta(first)
        for change in self._changes[name]:
            shape = change.shape(shape)
        return TensorMeta(shape, dtype)

    def keys(self) -> list[str]:
        """Return the base's names, then those of modules that the adapter adds."""
        known = self.store.keys()
        return [*known, *sorted(self.own - set(known))]

    def source(self, key: str) -> str:
        """Return the name that decides a tensor: its own where the adapter unties it."""
        return key if key in self.own else super().source(key)

    def declared_dtype(self, key: str) -> torch.dtype:
        """Return the default dtype of an output for this tensor; the adapter's for one that only the adapter has."""
        name = self.source(key)
        return self.changed_meta(name).dtype if name in self.own else super().declared_dtype(key)

    def changes(self, name: str) -> bool:
        """Tell whether the adapter changes a tensor."""
        return name in self._changes or name in self._copies

    def changed(self) -> list[str]:
        """Return the names of the tensors that the adapter changes."""
        return list(self._changes)

    def change(self, name: str) -> str | None:
        """Return the identities of the adapter's tensors, and its configuration."""
        if name in self._copies:
            return self.store.identity(self._copies[name])
        parts = [self._adapter.identity(key) for change in self._changes[name] for key in change.tensors]
        return None if None in parts else "+".join([*map(str, parts), self._config.text])

    def changed_meta(self, name: str) -> TensorMeta:
        """Return the adapted tensor's shape, and the dtype of the base's."""
        return self._metas[name]

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of an adapted tensor."""
        if name in self._copies:
            return self.store.read_flat(self._copies[name], start, stop)
        with self._lock:
            if self._kept is None or self._kept[0] != name:
                self._kept = None
                self._kept = (name, self._adapted(name))
            return self._kept[1].reshape(-1)[start:stop]

    def _adapted(self, name: str) -> Tensor:
        dtype = self._metas[name].dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        known = name in set(self.store)
        weight = self.store.read(name).to(compute) if known else torch.empty(0)
        for change in self._changes[name]:
            weight = change.apply(weight, lambda key: self._adapter.read(key).to(compute), dtype)
        return weight.to(dtype)

    def identity(self, key: str) -> str | None:
        """Return the identity of the base's tensor and of what the adapter does to it."""
        name = self.source(key)
        return super().identity(key) if name in set(self.store) else self.change(name)

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Pass the hint on where the base has the tensor."""
        if self.source(key) in set(self.store):
            super().will_need(key, start, stop)

    def close(self) -> None:
        """Close both."""
        super().close()
        self._adapter.close()
