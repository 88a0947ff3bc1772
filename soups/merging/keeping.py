"""Tensors that are kept from the base as they are: heads of other sizes, towers that only the base has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from soups.errors import ConfigError
from soups.stores.names.rules import is_embedding, is_head
from soups.stores.store import Store
from soups.stores.views import RenamedStore
from soups.weights import Weights, describe_mismatch

# Patterns that a hint names.
_MOST = 4


def is_kept(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a tensor's name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def kept_names(donor: Store, others: Iterable[Store], patterns: Sequence[str]) -> list[str]:
    """Return the names of the donor's tensors that patterns keep.

    Raises:
        ConfigError: a pattern matches no tensor of any model, or together they leave nothing to merge.
    """
    names = dict.fromkeys([*donor, *(name for store in others for name in store)])
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"keep: {pattern!r} matches no tensor of {donor.location} or of the other models. Names begin with {parts[:8]}."
            )
    kept = [name for name in donor if is_kept(name, patterns)]
    if kept and len(kept) == len(donor.keys()):
        raise ConfigError(
            f"keep: {list(patterns)} matches every tensor of {donor.location}, so nothing would be merged."
        )
    return kept


def without_kept(store: Store, patterns: Sequence[str]) -> Store:
    """Return a store without the tensors that match patterns."""
    return RenamedStore(store, lambda name: None if is_kept(name, patterns) else name) if patterns else store


def kept_ties(donor: Store, kept: Iterable[str]) -> dict[str, str]:
    """Return the ties of the donor whose both names are kept."""
    names = set(kept)
    return {name: first for name, first in donor.tied().items() if name in names and first in names}


def untied_by_keeping(donor: Store, kept: Iterable[str]) -> set[str]:
    """Return the output heads that are no longer tied to the embedding, because one of the two is kept and the other merged."""
    names = set(kept)
    pairs = [pair for pair in donor.tied().items() if (pair[0] in names) != (pair[1] in names)]
    return {name for pair in pairs for name in pair if is_head(name)}


def decides_vocabulary(kept: Iterable[str]) -> bool:
    """Tell whether an embedding or an output head is kept, so that the donor's vocabulary is the output's."""
    return any(is_embedding(name) or is_head(name) for name in kept)


def keep_hint(expected: Weights, found: Weights) -> str:
    """Return a sentence that names the option `keep`, where most tensors of two models agree; else the empty string.

    >>> import torch
    >>> one, two = torch.zeros(2), torch.zeros(3)
    >>> keep_hint({"a": one, "b": one, "head.w": one}, {"a": one, "b": one, "head.w": two})
    ' To take the tensors that differ from the base (or the first model) and merge the others, set keep to ["head.*"].'
    """
    names = dict.fromkeys([*expected, *found])
    odd = {
        name
        for name in names
        if name not in expected or name not in found or describe_mismatch({name: expected[name]}, {name: found[name]})
    }
    if not odd or 2 * len(odd) > len(names):
        return ""
    patterns: dict[str, None] = {}
    for name in sorted(odd):
        parent = name.rpartition(".")[0] + "."
        whole = parent != "." and all(one in odd for one in names if one.startswith(parent))
        patterns[f"{parent}*" if whole else name] = None
    shown = json.dumps(list(patterns)[:_MOST])
    shown = f"{shown[:-1]}, …]" if len(patterns) > _MOST else shown
    return f" To take the tensors that differ from the base (or the first model) and merge the others, set keep to {shown}."
