"""The tokens of a model: read from `tokenizer.json`, and those of several models in one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from soups.errors import ConfigError, WeightsError
from soups.merging.mergekit.rows import by_token
from soups.stores.store import Store
from soups.stores.tokenizer import TOKENIZER_FILES


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


def one_older_tokenizer(folders: Sequence[Path]) -> bool:
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
