"""Embeddings whose rows are rearranged for another vocabulary, while they are read."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from soups.stores.store import Store, TensorMeta
from soups.stores.views import StoreView

_PIECE = 1 << 18


# Tensors with a row for each token, in the architectures of the Hugging Face Hub.
_BY_TOKEN = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|shared|vocab_projector|"
    r"predictions\.decoder)\.(weight|bias)$|(^|\.)predictions\.bias$|^output\.weight$"
)


def by_token(name: str, meta: TensorMeta) -> bool:
    """Tell whether a tensor has one row for each token.

    >>> by_token("model.embed_tokens.weight", TensorMeta((9, 2), torch.float32)), by_token("h.0.w", TensorMeta((9, 2), torch.float32))
    (True, False)
    """
    return bool(meta.shape) and _BY_TOKEN.search(name) is not None


Origin = tuple[tuple[Store, int], ...]
"""Rows whose mean is taken; none gives zeros."""


@dataclass(frozen=True)
class RowTable:
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

    def __init__(self, store: Store, tables: Mapping[str, RowTable]) -> None:
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

    def _rows(self, key: str, table: RowTable, first: int, last: int, width: int, padding: bool = True) -> Tensor:
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

    def _mean(self, key: str, table: RowTable, width: int) -> Tensor:
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
