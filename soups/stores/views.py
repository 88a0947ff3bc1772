"""Views: stores that show another store under other names or with other contents. `StoreView` is their base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.stores.sources import FileRow
from soups.stores.store import Store, TensorMeta


class StoreView(Store):
    """A store that shows another store with some differences. A subclass overrides the differences; the rest is passed through.

    - For other names, override `original` and `keys`.
    - For other contents, override `changes` and `compute`; also `change` if the new contents can be identified, and
      `changed_meta` if shape or dtype differ.

    The methods for contents get the tensor's name in the underlying store. For tied names they get the first one. Tied tensors
    therefore change together and stay tied.

    Args:
        store: the underlying store; closed with this one.
        beside: stores that are read together with `store`, under the same names. A tie is kept only if all of them have it.
            They are not closed with this one.
    """

    def __init__(self, store: Store, *beside: Store) -> None:
        self.store = store
        self.location, self.metadata = store.location, store.metadata
        self._beside = beside

    def original(self, key: str) -> str:
        """Return a tensor's name in the underlying store; raise `absent` for an unknown name."""
        return key

    def changes(self, name: str) -> bool:
        """Tell whether this view changes a tensor's contents."""
        del name
        return False

    def change(self, name: str) -> str | None:
        """Return text that identifies the change of a tensor; None if only the result identifies it."""
        del name
        return None

    def changed_meta(self, name: str) -> TensorMeta:
        """Return shape and dtype of a changed tensor."""
        return self.store.meta(name)

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of a changed tensor, row-major, in the dtype of `changed_meta`."""
        raise NotImplementedError(f"{type(self).__name__} changes {name!r} but does not override compute.")

    @cached_property
    def _ties(self) -> dict[str, str]:
        ties = self.store.tied()
        for store in self._beside:
            other = store.tied()
            ties = {name: first for name, first in ties.items() if other.get(name, name) == other.get(first, first)}
        return ties

    def source(self, key: str) -> str:
        """Return a tensor's name in the underlying store; the first one for tied names."""
        name = self.original(key)
        return self._ties.get(name, name)

    @cached_property
    def unreadable(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tensors of unsupported dtypes, by name, with the dtype."""
        below = self.store.unreadable
        return {key: below[name] for key in (self.keys() if below else ()) if (name := self.source(key)) in below}

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return self.store.keys()

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor."""
        name = self.source(key)
        return self.changed_meta(name) if self.changes(name) else self.store.meta(name)

    def declared_dtype(self, key: str) -> torch.dtype:
        """Return the default dtype of an output for this tensor."""
        name = self.source(key)
        if self.changes(name) and self.changed_meta(name).dtype != self.store.meta(name).dtype:
            return self.changed_meta(name).dtype
        return self.store.declared_dtype(name)

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of a tensor, with this view's change."""
        name = self.source(key)
        if not self.changes(name):
            return self.store.read_flat(name, start, stop, out)
        return self.compute(name, start, self.changed_meta(name).numel if stop is None else stop)

    @cached_property
    def _tied(self) -> dict[str, str]:
        source = {key: self.source(key) for key in self.keys()}
        first: dict[str, str] = {}
        # The name that the store underneath ties others to leads here too, where this view shows it.
        for key, name in source.items():
            if self.original(key) == name:
                first.setdefault(name, key)
        for key, name in source.items():
            first.setdefault(name, key)
        return {key: first[name] for key, name in source.items() if first[name] != key}

    def tied(self) -> dict[str, str]:
        """Map each name that repeats another tensor to the first name that holds it."""
        return dict(self._tied)

    def identity(self, key: str) -> str | None:
        """Return the identity of the underlying tensor and of this view's change; None if either is unknown."""
        name = self.source(key)
        own = self.store.identity(name)
        if own is None or not self.changes(name):
            return own
        change = self.change(name)
        return None if change is None else f"{own}+{change}"

    def file_row(self, key: str, start: int) -> FileRow | None:
        """Return the location of a tensor's elements from `start` on; None if this view changes the tensor."""
        name = self.source(key)
        return None if self.changes(name) else self.store.file_row(name, start)

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Pass the hint to the underlying store, within the bounds of its tensor."""
        name = self.source(key)
        numel = self.store.meta(name).numel
        if start < numel:
            self.store.will_need(name, start, min(stop, numel))

    def close(self) -> None:
        """Close the underlying store."""
        self.store.close()


class RenamedStore(StoreView):
    """A store with other tensor names.

    Args:
        store: the store to read from; closed with this one.
        rename: maps a name in the store to the new name, or to `None` to leave the tensor out.

    Raises:
        WeightsError: two tensors get the same name.
    """

    def __init__(self, store: Store, rename: Callable[[str], str | None]) -> None:
        super().__init__(store)
        self._original: dict[str, str] = {}
        for key in store:
            name = rename(key)
            if name is None:
                continue
            if name in self._original:
                raise WeightsError(
                    f"{store.location}: tensors {self._original[name]!r} and {key!r} would both be called {name!r}. "
                    f"Strip fewer prefixes."
                )
            self._original[name] = key

    def keys(self) -> list[str]:
        """Return the new names."""
        return list(self._original)

    def original(self, key: str) -> str:
        """Return a tensor's name in the underlying store."""
        if key not in self._original:
            raise self.absent(key)
        return self._original[key]


class AliasedStore(StoreView):
    """A store in which some tensors have a second name.

    Args:
        store: the store to read from; closed with this one.
        aliases: maps a new name to a name in the store.
    """

    def __init__(self, store: Store, aliases: Mapping[str, str]) -> None:
        super().__init__(store)
        self.aliases = dict(aliases)

    def keys(self) -> list[str]:
        """Return the store's names, then the new names."""
        return [*self.store.keys(), *self.aliases]

    def original(self, key: str) -> str:
        """Return a tensor's name in the underlying store."""
        return self.aliases.get(key, key)
