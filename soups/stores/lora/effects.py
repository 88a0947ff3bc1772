"""What adapters change about a model's configuration: heads of their own, and vocabularies of another size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from soups.errors import StorageError
from soups.stores.lora.store import LoRAStore
from soups.stores.names.rules import is_embedding, is_head
from soups.stores.store import Store
from soups.stores.views import StoreView


def untied_heads(stores: Iterable[Store]) -> set[str]:
    """Return the output heads that an adapter trained in full, so that they are no longer tied to the embedding."""
    return {name for store in _adapted(stores) for name in store.own if is_head(name)}


def resized_vocabulary(stores: Iterable[Store]) -> int | None:
    """Return the number of tokens of an embedding that an adapter resized; None where none did."""
    for store in _adapted(stores):
        for name in store.changed():
            if (
                is_embedding(name)
                and name in set(store.store)
                and store.meta(name).shape != store.store.meta(name).shape
            ):
                return store.meta(name).shape[0]
    return None


def adapted_configuration(
    path: Path, stores: Iterable[Store], tied: Mapping[str, str], untied: Iterable[str] = ()
) -> bytes | None:
    """Return the text of a model's `config.json` that fits the adapted weights; None where the old one does.

    Args:
        path: of the base's `config.json`.
        stores: the models that the weights are made of.
        tied: the names that are tied in the weights.
        untied: output heads that were untied for another reason than an adapter.

    Raises:
        StorageError: the file is no JSON.
    """
    stores = list(stores)
    untied, size = (untied_heads(stores) | set(untied)) - set(tied), resized_vocabulary(stores)
    if not untied and size is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path} cannot be read ({error}). Copy the model again.") from error
    settings = cast("dict[str, Any]", content)
    parts = [settings, *(part for key in ("text_config",) if isinstance(part := settings.get(key), dict))]
    for part in parts:
        if untied and (part is settings or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if size is not None and "vocab_size" in part:
            part["vocab_size"] = size
    return (json.dumps(settings, indent=2) + "\n").encode()


def _adapted(stores: Iterable[Store]) -> Iterable[LoRAStore]:
    for store in stores:
        while isinstance(store, StoreView):
            if isinstance(store, LoRAStore):
                yield store
            store = store.store
