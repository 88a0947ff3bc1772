"""The objects of a repository: weights stored under their hash, records as JSON, and the tokenizer that goes with a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor

from soups.stores import write_safetensors
from soups.stores.shared import SharedFolder
from soups.stores.store import Store
from soups.stores.tokenizer import tokenizer_hash
from soups.weights import Weights, hash_weights

# Weights of any kind that `open_store` takes.
Weighable = str | os.PathLike[str] | Mapping[str, Tensor] | Store


def dump_record(record: BaseModel) -> bytes:
    """Return a record as JSON."""
    return (record.model_dump_json(indent=1) + "\n").encode()


def put_weights(place: SharedFolder, weights: Weights) -> tuple[str, int]:
    """Store weights under their hash; return it and the file's size. What is there whole is not written again."""
    # In one order, so that weights of one hash are one file: a round of one contribution is that contribution.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    name = hash_weights(weights)
    target = f"objects/{name}.safetensors"
    with tempfile.TemporaryDirectory(prefix="soups-push-") as scratch:
        file = Path(scratch) / "weights.safetensors"
        write_safetensors(file, weights)
        nbytes = file.stat().st_size
        # A file of this name has this content or was cut off.
        if place.size(target) != nbytes:
            place.put(target, file)
    return name, nbytes


def tokenizer_of(place: Weighable) -> str | None:
    """Return the hash of the tokenizer in a model folder; None when there is none."""
    return None if isinstance(place, Mapping | Store) else tokenizer_hash(place)
