"""One vocabulary for models of several: the tokenizer that is written, and which row of whose embedding stands for a token.

`tokenizer.json` is read and edited as the JSON that it is; only an older format is first converted by transformers. The rules
are mergekit's: a token that a model lacks gets the base model's row, or its only owner's, or the mean of its owners'; rows
beyond the tokens get the mean of the model's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soups.errors import ConfigError, did_you_mean
from soups.merging.mergekit.rows import Origin, RowTable, VocabularyStore, by_token
from soups.merging.mergekit.schema import Document, ModelReference, ModelToken, TokenSpec, ZeroToken
from soups.merging.mergekit.tokens import (
    Vocabulary,
    has_tokenizer,
    one_older_tokenizer,
    read_vocabulary,
    union,
    within_rows,
)
from soups.stores.store import Store


@dataclass(frozen=True)
class Shared:
    """The vocabulary of the output.

    Attributes:
        vocabulary: its tokens.
        size: rows of the output's embeddings.
        changed: whether its tokenizer.json is not the one in the folder.
    """

    vocabulary: Vocabulary
    size: int
    changed: bool


def share_vocabulary(
    document: Document,
    stores: dict[ModelReference, Store],
    folders: Mapping[ModelReference, Path],
    donor: ModelReference,
) -> Shared | None:
    """Bring every model to one vocabulary, as `tokenizer` or `tokenizer_source` asks for.

    Args:
        document: the configuration.
        stores: the models; those whose rows move are replaced.
        folders: where each model is.
        donor: whose tokenizer a union begins with.

    Returns:
        The output's vocabulary; `None` where none of the models has a tokenizer.

    Raises:
        ConfigError: a tokenizer is absent, or a token or model that is named is unknown.
        WeightsError: a model's embedding has no row for most of its tokenizer's tokens.
    """
    spec = document.tokenizer
    source = str((spec.source if spec else document.tokenizer_source) or "")
    edited = spec is not None and bool(spec.tokens or spec.pad_to_multiple_of)
    if not source or not any(has_tokenizer(folder) for folder in folders.values()):
        if edited:
            raise ConfigError("tokenizer: none of the models has a tokenizer. Save their tokenizers beside them.")
        return None
    absent = [reference for reference in stores if reference not in folders]
    if absent:
        raise ConfigError(f"tokenizer: {absent[0]} is no folder on this machine, so its tokenizer is not known.")
    if not edited and source in ("base", "union") and one_older_tokenizer(list(folders.values())):
        return None
    own: dict[ModelReference, Vocabulary] = {}
    stripped: set[int] = set()
    for reference, folder in folders.items():
        whole = read_vocabulary(folder)
        own[reference] = within_rows(whole, stores[reference])
        if own[reference] is not whole:
            stripped.add(id(own[reference]))
    first = own[document.base_model or donor]
    extra = list(spec.tokens or {}) if spec else []
    if source == "union":
        target = union(first, [vocabulary for vocabulary in own.values() if vocabulary is not first], extra)
        begun = first
    else:
        begun = _chosen(source, document, own)
        target = union(begun, [], extra)
    size = target.size
    multiple = spec.pad_to_multiple_of if spec else None
    if multiple:
        size = -(-size // multiple) * multiple
    base = document.base_model if document.base_model in own else None
    tokens = dict(spec.tokens or {}) if spec else {}
    plain = dict(stores)
    for reference, store in plain.items():
        table = _table(reference, target, size, own, plain, base, tokens)
        keys = [key for key in store if by_token(key, store.meta(key))]
        keys = [key for key in keys if store.meta(key).shape[0] != size or not table.identical]
        if keys:
            stores[reference] = VocabularyStore(store, dict.fromkeys(keys, table))
    return Shared(target, size, changed=target is not begun or id(begun) in stripped)


def _chosen(source: str, document: Document, own: Mapping[ModelReference, Vocabulary]) -> Vocabulary:
    if source == "base":
        if document.base_model is None:
            raise ConfigError("The tokenizer's source is 'base', but there is no base_model.")
        return own[document.base_model]
    for reference, vocabulary in own.items():
        if str(reference) == source:
            return vocabulary
    if Path(source).is_dir():
        return read_vocabulary(Path(source))
    raise ConfigError(f"The tokenizer's source {source!r} is neither 'union', nor 'base', nor a model folder.")


def _table(
    reference: ModelReference,
    target: Vocabulary,
    size: int,
    own: Mapping[ModelReference, Vocabulary],
    stores: Mapping[ModelReference, Store],
    base: ModelReference | None,
    tokens: Mapping[str, TokenSpec],
) -> RowTable:
    rows = np.full(size, -1, dtype=np.int64)
    others: dict[int, Origin] = {}
    mine = own[reference].ids
    for token, number in target.ids.items():
        spec = tokens.get(token)
        if spec and (spec.force or token not in mine):
            others[number] = _origin(token, spec, own, stores)
        elif token in mine:
            rows[number] = mine[token]
        else:
            owners = [base] if base and token in own[base].ids else [one for one in own if token in own[one].ids]
            others[number] = tuple((stores[one], own[one].ids[token]) for one in owners)
    return RowTable(rows, others)


def _origin(
    token: str, spec: TokenSpec, own: Mapping[ModelReference, Vocabulary], stores: Mapping[ModelReference, Store]
) -> Origin:
    source = spec.source
    if isinstance(source, ZeroToken):
        return ()
    model = source.model if isinstance(source, ModelToken) else source
    if model not in own:
        raise ConfigError(f"tokenizer: tokens: {token!r} is to be from {model}, which is not among the models.")
    ids = own[model].ids
    if isinstance(source, ModelToken) and source.token_id is not None:
        if not 0 <= source.token_id < own[model].size:
            raise ConfigError(f"tokenizer: tokens: {model} has ids 0 to {own[model].size - 1}, not {source.token_id}.")
        return ((stores[model], source.token_id),)
    wanted = str(source.token) if isinstance(source, ModelToken) else token
    if wanted not in ids:
        raise ConfigError(
            f"tokenizer: tokens: {model} has no token {wanted!r}; {did_you_mean(wanted, list(ids))}"[:800]
        )
    return ((stores[model], ids[wanted]),)


def truncate_embeddings(stores: dict[ModelReference, Store]) -> None:
    """Cut embeddings of different lengths to their common first rows (mergekit's --unsafe-truncate-embeddings)."""
    lengths: dict[str, set[int]] = {}
    for store in stores.values():
        for key in store:
            if by_token(key, store.meta(key)):
                lengths.setdefault(key, set()).add(store.meta(key).shape[0])
    shortest = {key: min(found) for key, found in lengths.items() if len(found) > 1}
    for reference, store in stores.items():
        tables = {key: RowTable(np.arange(rows)) for key, rows in shortest.items() if key in set(store)}
        tables = {key: table for key, table in tables.items() if len(table.own) < store.meta(key).shape[0]}
        if tables:
            stores[reference] = VocabularyStore(store, tables)
