"""`Job`: one tensor to make, and what all models share of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from soups.merging.attached import Statistic
from soups.merging.method import Method
from soups.merging.operands import Source
from soups.stores.store import TensorMeta


class Infinities(NamedTuple):
    """Where all models have the same infinity.

    Attributes:
        places: of the elements in the whole tensor, ascending; int64.
        values: the elements, in the dtype of the first source.
    """

    places: Tensor
    values: Tensor

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the places within elements `start:stop`, counted from `start`, and the values."""
        first, last = torch.searchsorted(self.places, torch.tensor([start, stop])).tolist()
        return self.places[first:last] - start, self.values[first:last]

    def put(self, result: Tensor, start: int) -> Tensor:
        """Return a merged stretch from element `start` on with the infinities in their places."""
        places, values = self.between(start, start + result.numel())
        if not len(places):
            return result
        whole = result.clone()  # the stretch may be a view of what a method still needs
        whole[places.to(whole.device)] = values.to(whole.device, whole.dtype)
        return whole


@dataclass(frozen=True)
class Job:
    """One tensor to make.

    Attributes:
        key: its name in the output.
        meta: its shape and dtype in the output.
        method: how to make it; `None` copies the first model's.
        models: the same tensor of each model.
        base: the base model's, or `None`.
        statistics: the models' statistics for this tensor, by kind.
        infinities: what all models share and the sources do not show; it is put back into the result.
    """

    key: str
    meta: TensorMeta
    method: Method | None
    models: tuple[Source, ...]
    base: Source | None = None
    statistics: Mapping[str, tuple[Statistic, ...]] = field(default_factory=dict[str, tuple[Statistic, ...]])
    infinities: Infinities | None = None

    def compute_dtype(self) -> torch.dtype:
        """Return float64 if any source or the output has it, else float32."""
        sources = [*self.models, *([self.base] if self.base else [])]
        dtypes = {self.meta.dtype, *(source.store.meta(source.key).dtype for source in sources)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def nbytes(self) -> int:
        """Return how many bytes one visit to every source reads."""
        sources = [*self.models, *([self.base] if self.base else [])]
        attached = (one.meta.nbytes for found in self.statistics.values() for one in found)
        return sum(source.store.meta(source.key).nbytes for source in sources) + sum(attached)

    def working_bytes(self) -> int:
        """Return the bytes of memory that the method needs for the whole tensor, beyond those of a chunk."""
        if self.method is None:
            return 0
        return self.method.working_bytes(self.meta, len(self.models), self.compute_dtype().itemsize)
