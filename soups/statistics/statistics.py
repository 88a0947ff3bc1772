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
stored as (in, out), as GPT-2's are), `mask`, `estimator`, `aliases`, `uncovered` (JSON). Gram matrices and Kronecker factors are
kept as their upper triangles, row by row (…, n(n+1)/2), where `packed` says so.
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
from soups.statistics.packing import UnpackedStore, is_symmetric, pack
from soups.stores import DictStore, Store, open_store, write_safetensors
from soups.stores.views import AliasedStore

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
        mask: which rows count: "padding left out", "all rows", or the name of a mask.
        estimator: of `fisher` and `kfac_out`: "true", "sampled" or "empirical".
        aliases: names whose sums are another name's, because two layers read one input.
        uncovered: parameters that no statistic covers, and why.

    Raises:
        WeightsError: a name without a known kind, or a count that is not positive.

    >>> one, two = (Statistics({"fisher/w": torch.tensor([2.0])}, weights_hash="a1", data=d, examples=4) for d in "bc")
    >>> total = one + two
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
        mask: str = "all rows",
        estimator: str | None = None,
        aliases: Mapping[str, str] | None = None,
        uncovered: Mapping[str, str] | None = None,
    ) -> None:
        self.store: Store = sums if isinstance(sums, Store) else DictStore(sums, "statistics in memory")
        if aliases:
            self.store = AliasedStore(self.store, aliases)
        self.aliases, self.uncovered = dict(aliases or {}), dict(uncovered or {})
        self.mask, self.estimator = mask, estimator
        self.weights_hash, self.data, self.examples = weights_hash, data, examples
        self.rows, self.transposed = dict(rows or {}), frozenset(transposed)
        self.rows |= {name: self.rows[first] for name, first in self.aliases.items() if first in self.rows}
        self._keys = frozenset(self.store)
        for name in self.store:
            kind = name.partition("/")[0]
            if kind not in KINDS:
                raise WeightsError(
                    f"{self.location}: {name!r} is of no known kind of statistics; {did_you_mean(kind, KINDS)}"
                )
            if self.count(name) < 1:
                raise WeightsError(f"{self.location}: {name!r} is a sum over {self.count(name)} rows or examples.")

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Store) -> Self:
        """Open a file of statistics, or take an opened one; its tensors are read when they are asked for.

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
                UnpackedStore(store) if found.get("packed") == "upper" else store,
                weights_hash=found["weights_hash"],
                data=found["data"],
                examples=int(found["examples"]),
                rows=cast("dict[str, int]", json.loads(found.get("rows", "{}"))),
                transposed=cast("list[str]", json.loads(found.get("transposed", "[]"))),
                mask=found.get("mask", "all rows"),
                estimator=found.get("estimator") or None,
                aliases=cast("dict[str, str]", json.loads(found.get("aliases", "{}"))),
                uncovered=cast("dict[str, str]", json.loads(found.get("uncovered", "{}"))),
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

    def names(self, kind: str | None = None) -> list[str]:
        """Return all names, or those of a kind."""
        return [name for name in self.store if kind is None or name.startswith(f"{kind}/")]

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __getitem__(self, name: str) -> Tensor:
        """Return a sum, float64.

        Raises:
            WeightsError: there is none of that name.
        """
        if name not in self:
            raise self.store.absent(name)
        return self.store.read(name).double()

    def mean(self, name: str) -> Tensor:
        """Return a sum divided by its count: the mean over rows, tokens or examples."""
        return self[name] / self.count(name)

    def load(self) -> dict[str, Tensor]:
        """Return all sums by name."""
        return self.store.load()

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> Path:
        """Write a safetensors file, under a temporary name first.

        Args:
            path: of the file.
            dtype: float64, or float32 for half the bytes; parts then add up to its rounding.
        """
        metadata = {
            "format": FORMAT,
            "kind": " ".join(self.kinds),
            "weights_hash": self.weights_hash,
            "data": self.data,
            "examples": str(self.examples),
            "rows": json.dumps(self.rows, sort_keys=True),
            "transposed": json.dumps(sorted(self.transposed)),
            "mask": self.mask,
            "estimator": self.estimator or "",
            "aliases": json.dumps(self.aliases),
            "uncovered": json.dumps(self.uncovered),
            "packed": "upper",
        }
        sums = {name: self.store.read(name).to(dtype) for name in self.store if name not in self.aliases}
        write_safetensors(
            Path(path), {name: pack(one) if is_symmetric(name) else one for name, one in sums.items()}, metadata
        )
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
        for what, ours, theirs in (
            ("mask rules", self.mask, other.mask),
            ("estimators", self.estimator, other.estimator),
        ):
            if ours != theirs:
                raise WeightsError(
                    f"{self.location} and {other.location} were collected with different {what}, {ours!r} and {theirs!r}, "
                    f"and do not add up. Collect both with one."
                )
        mine, added = self.load(), other.load()
        if mine.keys() != added.keys() or self.transposed != other.transposed:
            differing = sorted(mine.keys() ^ added.keys())
            raise WeightsError(
                f"{other.location} and {self.location} hold different statistics ({differing[:6]}). Collect the same kinds "
                f"for all parts."
            )
        digests = [*self.data.split("+"), *other.data.split("+")]
        if twice := sorted({digest for digest in digests if digests.count(digest) > 1}):
            raise WeightsError(
                f"{self.location} and {other.location} both hold the data {twice[0][:16]}, which would count twice. Add each "
                f"part once."
            )
        # Two names share a sum only where they do so in both parts.
        aliases = {name: first for name, first in self.aliases.items() if other.aliases.get(name) == first}
        return Statistics(
            {name: mine[name].double() + added[name].double() for name in mine if name not in aliases},
            weights_hash=self.weights_hash,
            data="+".join(sorted(digests)),
            examples=self.examples + other.examples,
            rows={name: self.count(name) + other.count(name) for name in self.rows | other.rows},
            transposed=self.transposed,
            mask=self.mask,
            estimator=self.estimator,
            aliases=aliases,
            uncovered={name: why for name, why in self.uncovered.items() if name in other.uncovered},
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
