"""Whole models of a pool, read as few times as memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from soups.stores.pool import Pool
from soups.stores.pool_of_checkpoints import CheckpointPool
from soups.weights import Weights

# Ingredients that are kept in memory, all together: many small models, or none of several large ones.
KEPT_BYTES = 2**30


class Models:
    """Weights of ingredients by fingerprint; those used last stay in memory, up to `limit` bytes.

    Args:
        pool: of the ingredients.
        limit: in bytes.
    """

    def __init__(self, pool: Pool | CheckpointPool, limit: int = KEPT_BYTES) -> None:
        self._pool, self._limit = pool, limit
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def weights(self, fingerprint: str) -> Weights:
        """Return the weights of an ingredient; they are shared, so nobody may change them.

        Raises:
            soups.errors.SoupError: they cannot be read.
        """
        if fingerprint in self._kept:
            self._kept.move_to_end(fingerprint)
            return self._kept[fingerprint]
        weights = self._pool.weights(fingerprint)
        self._sizes[fingerprint] = sum(tensor.nbytes for tensor in weights.values())
        self._kept[fingerprint] = weights
        while self._kept and sum(self._sizes[name] for name in self._kept) > self._limit:
            self._kept.popitem(last=False)
        return weights


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read when a model needs them: stored predictions need none."""

    def __init__(self, load: Callable[[], Weights]) -> None:
        self._load = load
        self._weights: Weights | None = None

    def _get(self) -> Weights:
        if self._weights is None:
            self._weights = self._load()
        return self._weights

    def __getitem__(self, key: str) -> Tensor:
        return self._get()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())
