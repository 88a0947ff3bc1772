"""Checkpoints of one architecture, saved under different names, brought to one set of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from soups.stores.names.library import Architecture, architecture_of
from soups.stores.names.matching import NameMatcher
from soups.stores.names.renames import Renames
from soups.stores.names.rules import is_derived, is_embedding, is_head, template
from soups.stores.store import Store, TensorMeta
from soups.stores.views import AliasedStore, RenamedStore

Key = TypeVar("Key")


@dataclass(frozen=True)
class Reconciled(Generic[Key]):
    """Checkpoints under one set of names.

    Attributes:
        stores: the checkpoints, or views of them that are closed with the stores underneath.
        given: the tied tensors that a checkpoint had left out, and the tensor that each repeats.
        left_out: the derived tensors that were not in every checkpoint; numbers are written as `*`.
    """

    stores: dict[Key, Store]
    given: dict[Key, dict[str, str]]
    left_out: frozenset[str] = frozenset()

    @property
    def heads(self) -> set[str]:
        """Names of all tied tensors that a checkpoint had left out."""
        return {name for names in self.given.values() for name in names}


def reconcile(
    stores: Mapping[Key, Store],
    reference: Key,
    folders: Mapping[Key, Path] | None = None,
    *,
    rename: Mapping[str, str] | None = None,
) -> Reconciled[Key]:
    """Show checkpoints under the names that one of them has.

    Names are matched through transformers' own renames, tied weights and ignored keys where the library is installed and a
    folder's `config.json` tells the architecture; else by the rules of `soups.stores.names.rules`. A tensor that follows
    from the configuration (`position_ids`, `inv_freq`, causal masks) and is not in every checkpoint is left out of all. A
    tied tensor that a checkpoint leaves out is given to it. Everything else that is only in some stays as it is, for the
    caller to refuse.

    Args:
        stores: the checkpoints.
        reference: the one whose names count.
        folders: their folders on this machine, where they have one.
        rename: the user's renames, applied to every name before everything else: regular expressions and replacements.

    Raises:
        ConfigError: a rename that is no regular expression.
        WeightsError: a rename gives two tensors one name.
    """
    renames = Renames(rename or {})
    shown: dict[Key, Store] = {
        key: RenamedStore(store, renames) if renames.table else store for key, store in stores.items()
    }
    if len({frozenset(_templates(store)) for store in shown.values()}) == 1:
        return Reconciled(shown, {})
    known = {key: architecture_of((folders or {}).get(key)) for key in shown}
    matcher = NameMatcher(_shapes(shown[reference]), known[reference])
    for key, store in shown.items():
        if key != reference and _templates(store) != _templates(shown[reference]):
            places = matcher.match(_shapes(store), known[key])
            if any(name != place for name, place in places.items()):
                shown[key] = RenamedStore(store, _renaming(places))
    return _complete(shown, [one for one in known.values() if one is not None], matcher)


def _renaming(places: Mapping[str, str]) -> Callable[[str], str]:
    return lambda name: places.get(name, name)


def _templates(store: Store) -> set[str]:
    return {template(name)[0] for name in store}


def _shapes(store: Store) -> dict[str, tuple[int, ...] | None]:
    return {name: store.meta(name).shape for name in store}


def _complete(stores: dict[Key, Store], known: list[Architecture], matcher: NameMatcher) -> Reconciled[Key]:
    """Leave out derived tensors and hand out tied ones, where not every store has them."""
    metas: dict[str, TensorMeta] = {}
    names: dict[str, str] = {}
    for store in stores.values():
        for name in store:
            metas.setdefault(template(name)[0], store.meta(name))
            names.setdefault(template(name)[0], name)
    owned = {key: _templates(store) for key, store in stores.items()}
    partial = [pattern for pattern in metas if not all(pattern in own for own in owned.values())]
    ties = tie_groups(known, matcher)
    dropped: set[str] = set()
    aliases: dict[Key, dict[str, str]] = {key: {} for key in stores}
    for pattern in partial:
        name = names[pattern]
        lacking = [key for key, own in owned.items() if pattern not in own]
        mates = {key: mate(stores[key], name, metas[pattern], ties) for key in lacking}
        if all(one is not None for one in mates.values()):
            for key, one in mates.items():
                if one is not None:
                    aliases[key][name] = one
        elif is_derived(name, metas[pattern]) or any(_is_ignored(name, one) for one in known):
            dropped.add(pattern)
    completed: dict[Key, Store] = {}
    for key, store in stores.items():
        seen = AliasedStore(store, aliases[key]) if aliases[key] else store
        gone = dropped & owned[key]
        completed[key] = RenamedStore(seen, _without(gone)) if gone else seen
    return Reconciled(completed, {key: names for key, names in aliases.items() if names}, frozenset(dropped))


def _is_ignored(name: str, architecture: Architecture) -> bool:
    both = (name, f"{architecture.prefix}.{name}")
    return any(pattern.search(one) for pattern in architecture.ignored for one in both)


def _without(patterns: set[str]) -> Callable[[str], str | None]:
    return lambda name: None if template(name)[0] in patterns else name


def tie_groups(known: list[Architecture], matcher: NameMatcher) -> list[set[str]]:
    """Return the groups of tied names that transformers knows, in the reference's names where it has them."""
    groups: list[set[str]] = []
    for architecture in known:
        places = matcher.match(
            dict.fromkeys([*architecture.ties, *architecture.ties.values()]), architecture, prefixes=False
        )
        for name, first in architecture.ties.items():
            pair = {name, first, places.get(name, name), places.get(first, first)}
            joined = [group for group in groups if group & pair]
            groups = [group for group in groups if not group & pair] + [pair.union(*joined)]
    return groups


def mate(store: Store, name: str, meta: TensorMeta, ties: list[set[str]]) -> str | None:
    """Return the tensor of a store that a name it lacks is tied to."""
    own = set(store)
    for group in ties:
        if name in group:
            return next((one for one in sorted(group) if one in own), None)
    if name.endswith("decoder.bias"):  # BERT's head: one bias under two names
        outer = name.removesuffix("decoder.bias") + "bias"
        return outer if outer in own and store.meta(outer).shape == meta.shape else None
    if len(meta.shape) != 2 or not (is_head(name) or is_embedding(name)) or "*" in template(name)[0]:
        return None
    if is_head(name) and any(is_head(one) for one in own):  # it has a head of its own, under a name that is not known
        return None
    candidates = [one for one in own if is_embedding(one) and len(store.meta(one).shape) == 2]
    fitting = {store.tied().get(one, one) for one in candidates if store.meta(one).shape[1] == meta.shape[1]}
    rows = {one for one in fitting if store.meta(one).shape == meta.shape}
    chosen = rows or (fitting if is_head(name) else set[str]())  # vocabularies may differ in size
    return chosen.pop() if len(chosen) == 1 else None
