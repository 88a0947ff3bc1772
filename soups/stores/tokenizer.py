"""Which tokenizer a model folder comes with: token ids of one mean nothing to the embeddings of another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from soups.errors import StorageError

# The first that is there is the tokenizer: Hugging Face's format, then those of older ones.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
)  # fmt: skip
# What the last call of a fast tokenizer leaves in its file; it changes no token's id.
_STATE = ("truncation", "padding")


def tokenizer_hash(folder: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of what decides the token ids of a model folder; None where there is no tokenizer.

    Raises:
        StorageError: its file is damaged.
    """
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            try:
                found: Any = json.loads(content)
            except ValueError as error:
                raise StorageError(f"{path} is no JSON ({error}): the tokenizer's file is damaged.") from error
            if isinstance(found, dict):
                found = {key: value for key, value in found.items() if key not in _STATE}
            content = json.dumps(found, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()
    return None
