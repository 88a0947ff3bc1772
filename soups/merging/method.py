"""What a merge method is: an optional look at a whole tensor (or model), then an answer for each chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk, Unit
from soups.merging.operands import Operands
from soups.merging.selection import Map
from soups.stores.store import TensorMeta

Scope = Literal["element", "row", "tensor", "model"]

PerModel = float | Sequence[float]
"""One number for all models, or one for each, in their order. `per_model` and `one_of` read it."""


class Method(ABC):
    """A merge method with its parameters. Concrete methods are frozen dataclasses and are not subclassed.

    Attributes:
        base: whether it needs a base model, takes one if there is one, or has no use for one.
        least, most: how many models, the base not counted; `most` is `None` where there is no limit.
        statistics: the kinds of statistics that it needs from every model (`soups.statistics.KINDS`). A tensor that a kind
            does not cover comes without it.
        complex: whether it merges complex numbers too.
        loops: whether `combine` is one compiled loop where there are such, so that larger chunks pay.
        unit: what `combine` must see whole.
        scope: how far away an element can be and still matter.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    statistics: ClassVar[tuple[str, ...]] = ()
    complex: ClassVar[bool] = False
    loops: ClassVar[bool] = False

    @property
    def unit(self) -> Unit:
        """What `combine` must see whole: nothing, a row, or the tensor."""
        return "element"

    @property
    def scope(self) -> Scope:
        """How far away an element can be and still matter."""
        return self.unit

    def observe(self, operands: Operands) -> Any:
        """Look at one tensor of every model before `combine`; called for scope row or tensor. The answer is passed on."""
        return None

    @abstractmethod
    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk, flat, in the compute dtype or in `chunk.into`.

        Args:
            chunk: one stretch of every model.
            seen: what `observe`, or a `WholeModelMethod`'s `observe_all`, returned.
        """

    def fits(self, kind: str, weight: TensorMeta, statistic: TensorMeta) -> bool:
        """Tell whether a statistic has the shape that this method expects for a weight; by default the weight's own."""
        del kind
        return weight.shape == statistic.shape

    def working_bytes(self, weight: TensorMeta, models: int, itemsize: int) -> int:
        """Return the bytes of memory that one tensor takes beyond a chunk's; 0 for methods that see no whole tensors."""
        return weight.numel * itemsize * (2 * models + 6) if self.unit == "tensor" else 0

    def check(self, models: int, *, has_base: bool, name: str) -> None:
        """Check that the number of models and the base fit.

        Raises:
            ConfigError: they do not.
        """
        if self.base == "required" and not has_base:
            raise ConfigError(
                f"{name} works on task vectors and needs a base model: name the one the models started from."
            )
        if models < self.least or (self.most is not None and models > self.most):
            range_ = f"exactly {self.least}" if self.least == self.most else f"at least {self.least}"
            if self.most is not None and self.least != self.most:
                range_ = f"{self.least} to {self.most}"
            raise ConfigError(f"{name} needs {range_} models besides the base; there are {models}.")


class WholeModelMethod(Method):
    """A method that looks at whole models, if its scope is "model"."""

    @abstractmethod
    def observe_all(self, operands: Sequence[Operands], map: Map) -> Any:
        """Look at every tensor of every model before any `combine`; called once."""


class WholeTensorMethod(Method):
    """A method whose `combine` needs the whole tensor of every model, and no look beforehand."""

    @property
    def unit(self) -> Unit:
        """The tensor must be whole."""
        return "tensor"

    @property
    def scope(self) -> Scope:
        """Nothing is looked at beforehand."""
        return "element"


def per_model(value: PerModel, count: int, what: str = "weight") -> list[float]:
    """Return one number a model from one number for all, or from one for each.

    >>> per_model(0.5, 2), per_model([1, 2], 2)
    ([0.5, 0.5], [1.0, 2.0])

    Raises:
        ConfigError: as many numbers as models were expected.
    """
    if isinstance(value, int | float):
        return [float(value)] * count
    if len(value) != count:
        raise ConfigError(f"{what} has {len(value)} values for {count} models; give one for all, or one for each.")
    return [float(item) for item in value]


def one_of(value: PerModel, model: int, *, share: str | None = None) -> float:
    """Return a model's number from one number for all, or from one for each.

    Args:
        value: the number or numbers.
        model: which.
        share: what to call it if it must lie between 0 and 1.

    Raises:
        ConfigError: it must and does not.
    """
    found = value if isinstance(value, int | float) else value[model]
    if share and not 0 <= found <= 1:
        raise ConfigError(f"{share}={found} is not between 0 and 1, the share of a task vector to keep.")
    return found


def as_mask(condition: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ones where a condition holds and zeros elsewhere; by way of bytes, because from bool it takes ten times as long."""
    return condition.view(torch.uint8).to(dtype)


def running_sum(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """Return Σ w_i x_i of tensors that come one by one in the same memory; the same bits as `weighted_sum`."""
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        term = tensor if weight == 1 else tensor.mul_(weight)
        total = term.clone() if total is None else total.add_(term)
    assert total is not None
    return total


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ w_i x_i, added from the left. The tensors may be overwritten.

    Multiplication and addition are two roundings on purpose: a fused one would be rounded differently at the vector
    loop's end, and results would depend on where chunks end.
    """
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        term = tensor if weight == 1 else tensor.mul_(weight)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total
