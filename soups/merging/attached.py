"""Statistics that go with one tensor: further operands of a merge, of other shapes than the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from soups.stores.store import Store, TensorMeta


class Statistic(NamedTuple):
    """One tensor of one model's statistics.

    Attributes:
        store: where it is.
        key: its name there, `kind/weight`.
        terms: over how many rows or examples it is summed.
        transposed: whether the weight that it is about is stored as (in, out).
    """

    store: Store
    key: str
    terms: int
    transposed: bool = False

    @property
    def meta(self) -> TensorMeta:
        """Its shape and dtype."""
        return self.store.meta(self.key)

    def mean(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements `start:stop` of the sum divided by the count, flat, float64, on the CPU."""
        return self.store.read_flat(self.key, start, stop).to(torch.float64, copy=True).div_(self.terms)


@dataclass(frozen=True)
class Attached:
    """The statistics of every model for one tensor, by kind; a kind that does not cover the tensor is absent.

    Attributes:
        kinds: for each kind, one for each model.
        device: where to compute.
    """

    kinds: Mapping[str, tuple[Statistic, ...]] = field(default_factory=dict[str, tuple[Statistic, ...]])
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __contains__(self, kind: str) -> bool:
        return kind in self.kinds

    def only(self, model: int) -> Attached:
        """Return one model's."""
        return Attached({kind: (found[model],) for kind, found in self.kinds.items()}, self.device)

    def stretches(self, kind: str, start: int, stop: int) -> list[Tensor]:
        """Return elements `start:stop` of a statistic of the weight's shape, one flat float64 mean a model."""
        return [one.mean(start, stop).to(self.device) for one in self.kinds[kind]]

    def whole(self, kind: str, model: int) -> Tensor:
        """Return one model's statistic, a float64 mean in its own shape."""
        one = self.kinds[kind][model]
        return one.mean().to(self.device).view(one.meta.shape)

    def transposed(self, kind: str) -> bool:
        """Tell whether the weight is stored as (in, out)."""
        return self.kinds[kind][0].transposed
