"""`Statistics`: sums over data about the weights of one model, in memory or in a safetensors file.

Sums and counts are kept, never means, so that parts add up over batches, processes and files. A set of statistics belongs to
one model, known by the hash of its weights, and to some data, known by their digest. A merge refuses statistics of other
weights.

A file holds one tensor for each kind and weight, named `kind/weight`:

| name | shape for a weight | summed over |
|---|---|---|
| `gram/<weight>` | (in, in), or (groups, in, in): XᵀX of the inputs | rows |
| `kfac_out/<weight>` | (out, out): gᵀg of the gradients by the outputs | rows |
| `fisher/<parameter>` | the parameter's: squared gradients of the log-likelihood | examples |
| `second_moment/<scale>` | the scale's: squared normalised inputs | rows |
| `frequency/<embedding>` | (tokens,): how often each token occurs | tokens |
| `gradient/<parameter>` | the parameter's: gradients of the loss | examples |
| `sensitivity/<parameter>` | () : |θ · gradient| | examples |

The header's metadata are text: `format`, `kind` (the kinds, separated by spaces), `weights_hash`, `data`, `examples` (a
number), `rows` (JSON: the counts of tensors that are not summed over examples), `transposed` (JSON: the weights that are
stored as (in, out), as GPT-2's are).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from soups.errors import WeightsError, did_you_mean
from soups.stores import DictStore, Store, open_store, write_safetensors

FORMAT = "soups.statistics/1"
KINDS = ("gram", "kfac_out", "fisher", "second_moment", "frequency", "gradient", "sensitivity")
_PIECE = 1 << 22


class Statistics:
    """Statistics of one model. Open a file with `Statistics.open`; add parts with `+`.

    Args:
        sums: the sums by name (`kind/weight`), as tensors or in a store; any floating dtype.
        weights_hash: `soups.weights.hash_weights` of the model's weights.
        data: a digest, or another name, of the data.
        examples: the number of examples.
        rows: the counts of tensors that are summed over something else.
        transposed: weights that are stored as (in, out).

    Raises:
        WeightsError: a name without a known kind, or a count that is not positive.

    >>> part = Statistics({"fisher/w": torch.tensor([2.0])}, weights_hash="a1", data="b2", examples=4)
    >>> total = part + part
    >>> total.load()["fisher/w"], total.count("fisher/w"), total.kinds
    (tensor([4.], dtype=torch.float64), 8, ('fisher',))
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor] | Store,
        *,
        weights_hash: str,
        data: str,
        examples: int,
        rows: Mapping[str, int] | None = None,
        transposed: Iterable[str] = (),
    ) -> None:
        self.store = sums if isinstance(sums, Store) else DictStore(sums, "statistics in memory")
        self.weights_hash, self.data, self.examples = weights_hash, data, examples
        self.rows, self.transposed = dict(rows or {}), frozenset(transposed)
        for name in self.store:
            kind = name.partition("/")[0]
            if kind not in KINDS:
                raise WeightsError(
                    f"{self.location}: {name!r} is of no known kind of statistics; {did_you_mean(kind, KINDS)}"
                )
            if self.count(name) < 1:
                raise WeightsError(f"{self.location}: {name!r} is a sum over {self.count(name)} rows or examples.")

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> Self:
        """Open a file of statistics; its tensors are read when they are asked for.

        Raises:
            StorageError: there is no such file, or it is damaged.
            WeightsError: it holds no statistics.
        """
        store = open_store(place)
        try:
            found = store.metadata
            if found.get("format") != FORMAT:
                raise WeightsError(
                    f"{store.location} holds no statistics: its header does not say {FORMAT!r}. Statistics are written by "
                    f"Statistics.save."
                )
            return cls(
                store,
                weights_hash=found["weights_hash"],
                data=found["data"],
                examples=int(found["examples"]),
                rows=cast("dict[str, int]", json.loads(found.get("rows", "{}"))),
                transposed=cast("list[str]", json.loads(found.get("transposed", "[]"))),
            )
        except (KeyError, ValueError) as error:
            store.close()
            raise WeightsError(f"{store.location}: the header of these statistics is damaged ({error!r}).") from error
        except BaseException:
            store.close()
            raise

    @property
    def location(self) -> str:
        """Where the statistics are, for messages."""
        return self.store.location

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that there are, in the order of `KINDS`."""
        found = {name.partition("/")[0] for name in self.store}
        return tuple(kind for kind in KINDS if kind in found)

    def count(self, name: str) -> int:
        """Return over how many rows, tokens or examples a tensor is summed."""
        return self.rows.get(name, self.examples)

    def load(self) -> dict[str, Tensor]:
        """Return all sums by name."""
        return self.store.load()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, under a temporary name first."""
        metadata = {
            "format": FORMAT,
            "kind": " ".join(self.kinds),
            "weights_hash": self.weights_hash,
            "data": self.data,
            "examples": str(self.examples),
            "rows": json.dumps(self.rows, sort_keys=True),
            "transposed": json.dumps(sorted(self.transposed)),
        }
        write_safetensors(Path(path), self.load(), metadata)
        return Path(path)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the sums over both parts, in float64.

        Raises:
            WeightsError: the parts are of other weights, or hold other tensors.
        """
        if self.weights_hash != other.weights_hash:
            raise WeightsError(
                f"{other.location} and {self.location} are statistics of different weights and do not add up."
            )
        mine, theirs = self.load(), other.load()
        if mine.keys() != theirs.keys() or self.transposed != other.transposed:
            differing = sorted(mine.keys() ^ theirs.keys())
            raise WeightsError(
                f"{other.location} and {self.location} hold different statistics ({differing[:6]}). Collect the same kinds for all parts."
            )
        digests = sorted({*self.data.split("+"), *other.data.split("+")})
        return Statistics(
            {name: mine[name].double() + theirs[name].double() for name in mine},
            weights_hash=self.weights_hash,
            data="+".join(digests),
            examples=self.examples + other.examples,
            rows={name: self.count(name) + other.count(name) for name in self.rows | other.rows},
            transposed=self.transposed,
        )

    def check_weights(self, model: Store) -> None:
        """Check that these are statistics of a model. Every tensor of the model is read once for that.

        Raises:
            WeightsError: they are of other weights.
        """
        if hash_store(model) != self.weights_hash:
            raise WeightsError(
                f"{self.location} holds statistics of other weights than {model.location} (their hashes differ). Give each "
                f"model's own statistics, in the order of the models, or collect them again."
            )

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def hash_store(store: Store) -> str:
    """Return `soups.weights.hash_weights` of a store's tensors, which are read a stretch at a time.

    >>> from soups.weights import hash_weights
    >>> hash_store(DictStore({"w": torch.ones(3)})) == hash_weights({"w": torch.ones(3)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(store):
        meta = store.meta(name)
        digest.update(f"{name}|{meta.dtype}|{tuple(meta.shape)}|".encode())
        for start in range(0, meta.numel, _PIECE):
            values: Any = store.read_flat(name, start, min(start + _PIECE, meta.numel)).contiguous()
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
