"""Fusing: each contribution as an update of the current base, then any merge method, in float64 and in one order.

A contribution θ that started from base b counts as  B + s · (θ − b)  on the current base B. For a fresh one (b = B) that was
not clipped (s = 1) this is θ itself, bit for bit, so that `linear` is the paper's mean of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soups.merging import execute, make_method, plan_merge
from soups.protocols.cold_fusion.records import Policy
from soups.stores.store import Store, TensorMeta
from soups.stores.views import StoreView


class UpdateStore(StoreView):
    """A contribution as an update of the current base, in float64.

    Args:
        weights: the pushed weights.
        start: the base it started from.
        current: the current base.
        scale: factor on the update.
        fresh: whether it started from the current base.
    """

    def __init__(self, weights: Store, start: Store, current: Store, scale: float, *, fresh: bool) -> None:
        super().__init__(weights, start, current)
        self._start, self._current = start, current
        self._scale, self._as_it_is = scale, fresh and scale == 1

    def changes(self, name: str) -> bool:
        """Tell that every tensor is changed, if only to float64."""
        del name
        return True

    def changed_meta(self, name: str) -> TensorMeta:
        """Return the shape, and float64."""
        return TensorMeta(self.store.meta(name).shape, torch.float64)

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of B + s (θ − b)."""
        value = self.store.read_flat(name, start, stop).double()
        if self._as_it_is:
            return value
        update = value - self._start.read_flat(name, start, stop).double()
        return update.mul_(self._scale).add_(self._current.read_flat(name, start, stop).double())


def update_norm(weights: Store, start: Store) -> float:
    """Return the L2 norm of θ − b over all tensors; NaN or infinity where the weights hold such."""
    total = 0.0
    for key in sorted(weights.keys()):
        difference = weights.read(key).double() - start.read(key).double()
        total += float(difference.square_().sum())
    return math.sqrt(total) if math.isfinite(total) else total


@dataclass(frozen=True)
class AcceptedUpdate:
    """An accepted contribution: opens its weights and the base it started from; its factor; whether that base is current."""

    open: Callable[[], Store]
    open_start: Callable[[], Store]
    scale: float
    fresh: bool


def fuse_updates(policy: Policy, current: Store, updates: Sequence[AcceptedUpdate]) -> dict[str, Tensor]:
    """Return the new base from the accepted contributions, in the dtypes of the current one.

    The arithmetic is in float64 whatever the dtype, in the order given, with one rounding at the end; the bits depend on
    neither the machine's number of threads nor on who fuses.

    Raises:
        soups.errors.SoupError: the method does not exist, or does not take so many models.
    """
    method = make_method(policy.method, **policy.parameters)
    models: list[Store] = []
    opened: list[Store] = []
    try:
        for update in updates:
            weights, start = update.open(), update.open_start()
            opened += [weights, start]
            models.append(UpdateStore(weights, start, current, update.scale, fresh=update.fresh))
        fused = execute(plan_merge(method, models, current), None)
    finally:
        for store in opened:
            store.close()
    assert isinstance(fused, dict)
    return fused
