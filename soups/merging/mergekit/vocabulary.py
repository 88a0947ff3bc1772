"""One vocabulary for models of several: the tokenizer that is written, and which row of whose embedding stands for a token.

`tokenizer.json` is read and edited as the JSON that it is; only an older format is first converted by transformers. The rules
are mergekit's: a token that a model lacks gets the base model's row, or its only owner's, or the mean of its owners'; rows
beyond the tokens get the mean of the model's rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.merging.mergekit.schema import Document, ModelToken, Reference, TokenSpec, ZeroToken
from soups.stores.store import Store, TensorMeta
from soups.stores.tokenizer import TOKENIZER_FILES
from soups.stores.views import StoreView

# Tensors with a row for each token, in the architectures of the Hugging Face Hub.
_BY_TOKEN = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|shared|vocab_projector|"
    r"predictions\.decoder)\.(weight|bias)$|(^|\.)predictions\.bias$|^output\.weight$"
)
_PIECE = 1 << 18


def by_token(name: str, meta: TensorMeta) -> bool:
    """Tell whether a tensor has one row for each token.

    >>> by_token("model.embed_tokens.weight", TensorMeta((9, 2), torch.float32)), by_token("h.0.w", TensorMeta((9, 2), torch.float32))
    (True, False)
    """
    return bool(meta.shape) and _BY_TOKEN.search(name) is not None


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one `tokenizer.json`.

    Attributes:
        ids: token to id, in the order of ids.
        added: the file's entries for added tokens, by token.
        content: the whole file.
        folder: where it is.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    content: dict[str, Any]
    folder: Path

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


# What a tokenizer is saved as where there is no tokenizer.json: sentencepiece's models, and the lists of older formats.
_OLDER = TOKENIZER_FILES[1:]


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer in any format."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _one_older_tokenizer(folders: Sequence[Path]) -> bool:
    """Tell whether all folders hold the same bytes in older formats, so that there is nothing to bring together."""
    contents = {
        tuple((name, (folder / name).read_bytes()) for name in _OLDER if (folder / name).is_file())
        for folder in folders
    }
    return len(contents) == 1 and not any((folder / "tokenizer.json").is_file() for folder in folders)


def _converted(folder: Path) -> str:
    """Return as `tokenizer.json` what a folder has in an older format. Only here is a tokenizer built, by transformers.

    Raises:
        ConfigError: there is no tokenizer, transformers is not installed, or it cannot convert this one.
    """
    found = next((name for name in _OLDER if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"{folder} has no tokenizer, which is needed to bring vocabularies together. Save it beside the weights."
        )
    advice = (
        "Save the tokenizer once where it can be loaded (AutoTokenizer.from_pretrained(…).save_pretrained(…)), which writes "
        "a tokenizer.json."
    )
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return str(tokenizer.backend_tokenizer.to_str())
    except ImportError as error:
        raise ConfigError(
            f"{folder / found} must be converted to tokenizer.json, and that needs a package that is not installed: {error}. "
            f"pip install transformers sentencepiece protobuf, or: {advice}"
        ) from error
    except Exception as error:  # transformers raises what its many loaders happen to raise
        raise ConfigError(f"{folder / found} cannot be converted to tokenizer.json ({error}). {advice}") from error


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read a folder's `tokenizer.json`; make one of a tokenizer in an older format.

    Raises:
        ConfigError: there is no tokenizer, it is not in the format of Hugging Face's tokenizers, or it cannot be converted.
    """
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else _converted(folder)
        content = cast("dict[str, Any]", json.loads(text))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores
            ids = {str(piece[0]): number for number, piece in enumerate(cast("list[Any]", vocabulary))}
        else:
            ids = {str(token): int(number) for token, number in cast("dict[str, Any]", vocabulary).items()}
        added = {str(entry["content"]): dict(entry) for entry in content.get("added_tokens") or []}
        ids |= {token: int(entry["id"]) for token, entry in added.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is no tokenizer of the Hugging Face format ({error!r}). Copy it again.") from error
    return Vocabulary(dict(sorted(ids.items(), key=lambda item: item[1])), added, content, folder)


def union(first: Vocabulary, others: Sequence[Vocabulary], tokens: Sequence[str] = ()) -> Vocabulary:
    """Return the first vocabulary with the tokens that only others have behind its own, as added tokens.

    Args:
        first: keeps its ids.
        others: plain tokens first, model by model, then their added tokens.
        tokens: further tokens to add at the end.
    """
    ids, added = dict(first.ids), dict(first.added)
    new: dict[str, dict[str, Any]] = {}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    for other in others:
        for token in other.ids:
            if token not in ids and token not in other.added:
                new.setdefault(token, plain)
    for other in others:
        for token, entry in other.added.items():
            if token not in ids:
                new[token] = entry
    for token in tokens:
        if token not in ids:
            new.setdefault(token, plain)
    if not new:
        return first
    start = first.size
    for number, (token, entry) in enumerate(new.items(), start):
        ids[token] = number
        added[token] = {**entry, "id": number, "content": token}
    entries = sorted(added.values(), key=lambda entry: entry["id"])
    return Vocabulary(ids, added, {**first.content, "added_tokens": entries}, first.folder)


Origin = tuple[tuple[Store, int], ...]
"""Rows whose mean is taken; none gives zeros."""


@dataclass(frozen=True)
class Table:
    """Where each row of a model's embedding comes from.

    Attributes:
        own: the model's own row for each row of the output, or −1.
        others: where a row that is not its own comes from; rows in neither get the mean of all that are in one.
    """

    own: np.ndarray[tuple[int], np.dtype[np.int64]]
    others: Mapping[int, Origin] = field(default_factory=dict[int, Origin])

    @property
    def identical(self) -> bool:
        """Whether every row stays where it is."""
        return bool((self.own == np.arange(len(self.own))).all())


class VocabularyStore(StoreView):
    """A model seen with another vocabulary: tensors with a row for each token have their rows rearranged while reading.

    Args:
        store: the model; closed with this store.
        tables: by name, how a tensor's rows are arranged.
    """

    def __init__(self, store: Store, tables: Mapping[str, Table]) -> None:
        super().__init__(store)
        self._tables = {self.source(key): table for key, table in tables.items()}
        self._means: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def changes(self, name: str) -> bool:
        """Tell whether a tensor has a row for each token."""
        return name in self._tables

    def changed_meta(self, name: str) -> TensorMeta:
        """Return shape and dtype of a tensor, as rearranged."""
        meta = self.store.meta(name)
        return TensorMeta((len(self._tables[name].own), *meta.shape[1:]), meta.dtype)

    def change(self, name: str) -> str | None:
        """Return a hash of where each row comes from; None where the identity of another model is not known."""
        table = self._tables[name]
        digest = hashlib.sha256(table.own.tobytes())
        for row, origin in sorted(table.others.items()):
            places = [(store.identity(name), number) for store, number in origin]
            if any(place is None for place, _ in places):
                return None
            digest.update(repr((row, places)).encode())
        return digest.hexdigest()

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of a rearranged tensor."""
        table, meta = self._tables[name], self.changed_meta(name)
        width = max(1, meta.numel // max(1, meta.shape[0]))
        first, last = start // width, -(-stop // width)
        rows = self._rows(name, table, first, last, width)
        return rows.view(-1)[start - first * width : stop - first * width]

    def _rows(self, key: str, table: Table, first: int, last: int, width: int, padding: bool = True) -> Tensor:
        own = table.own[first:last]
        result = torch.empty(last - first, width, dtype=self.store.meta(key).dtype)
        breaks = np.flatnonzero((np.diff(own) != 1) | (own[:-1] < 0)) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(own)], strict=True):
            if begin == end:
                continue
            row = int(own[begin])
            if row >= 0:
                result[begin:end] = self.store.read(key, slice(row, row + end - begin)).view(-1, width)
            elif first + begin in table.others:
                result[begin] = _mean_of(table.others[first + begin], key, width)
            else:
                result[begin] = self._mean(key, table, width) if padding else 0
        return result

    def _mean(self, key: str, table: Table, width: int) -> Tensor:
        """Return the mean of the rows that stand for tokens, float32 (width,)."""
        with self._lock:
            if key not in self._means:
                total = torch.zeros(width, dtype=torch.float64)
                step = max(1, _PIECE // width)
                for first in range(0, len(table.own), step):
                    last = min(first + step, len(table.own))
                    total += self._rows(key, table, first, last, width, padding=False).double().sum(0)
                count = int((table.own >= 0).sum()) + len(table.others)
                self._means[key] = (total / max(1, count)).float()
            return self._means[key]


def _mean_of(origin: Origin, key: str, width: int) -> Tensor:
    total = torch.zeros(width)
    for store, row in origin:
        total += store.read(key, slice(row, row + 1)).float().view(-1)
    return total / max(1, len(origin))


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
    document: Document, stores: dict[Reference, Store], folders: Mapping[Reference, Path], donor: Reference
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
    if not edited and source in ("base", "union") and _one_older_tokenizer(list(folders.values())):
        return None
    own: dict[Reference, Vocabulary] = {}
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


def within_rows(vocabulary: Vocabulary, store: Store) -> Vocabulary:
    """Return a model's vocabulary without the tokens that its embedding has no row for, as mergekit does.

    Fine-tunes of Llama 2 often have a `[PAD]` with the first id behind the embedding's rows, which is never looked up.

    Raises:
        WeightsError: most tokens have no row.
    """
    rows = min((store.meta(key).shape[0] for key in store if by_token(key, store.meta(key))), default=vocabulary.size)
    beyond = {token for token, number in vocabulary.ids.items() if number >= rows}
    if not beyond:
        return vocabulary
    if 2 * len(beyond) > len(vocabulary.ids):
        raise WeightsError(
            f"{store.location}: the embedding has {rows} rows, but its tokenizer has ids up to {vocabulary.size - 1}. The "
            f"tokenizer belongs to another model."
        )
    model = dict(vocabulary.content["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in beyond}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = model["vocab"][:rows]
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not beyond.intersection(_pair(merge))]
    added = {token: entry for token, entry in vocabulary.added.items() if token not in beyond}
    content = {**vocabulary.content, "model": model, "added_tokens": list(added.values())}
    ids = {token: number for token, number in vocabulary.ids.items() if token not in beyond}
    return Vocabulary(ids, added, content, vocabulary.folder)


def _pair(merge: Any) -> tuple[str, ...]:
    """Return the two tokens of a BPE merge, and the token that they make."""
    parts = merge.split(" ") if isinstance(merge, str) else [str(part) for part in merge]
    return (*parts, "".join(parts))


def _chosen(source: str, document: Document, own: Mapping[Reference, Vocabulary]) -> Vocabulary:
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
    reference: Reference,
    target: Vocabulary,
    size: int,
    own: Mapping[Reference, Vocabulary],
    stores: Mapping[Reference, Store],
    base: Reference | None,
    tokens: Mapping[str, TokenSpec],
) -> Table:
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
    return Table(rows, others)


def _origin(
    token: str, spec: TokenSpec, own: Mapping[Reference, Vocabulary], stores: Mapping[Reference, Store]
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


def truncate_embeddings(stores: dict[Reference, Store]) -> None:
    """Cut embeddings of different lengths to their common first rows (mergekit's --unsafe-truncate-embeddings)."""
    lengths: dict[str, set[int]] = {}
    for store in stores.values():
        for key in store:
            if by_token(key, store.meta(key)):
                lengths.setdefault(key, set()).add(store.meta(key).shape[0])
    shortest = {key: min(found) for key, found in lengths.items() if len(found) > 1}
    for reference, store in stores.items():
        tables = {key: Table(np.arange(rows)) for key, rows in shortest.items() if key in set(store)}
        tables = {key: table for key, table in tables.items() if len(table.own) < store.meta(key).shape[0]}
        if tables:
            stores[reference] = VocabularyStore(store, tables)
