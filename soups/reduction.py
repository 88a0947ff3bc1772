"""The weighted sum Σ wᵢxᵢ behind every average in the package, and its rounding rule.

Users of it: `recipes.uniform` and the other recipes, `merge("linear")` with and without the compiled loops, `SWA.value()`, WARM
and the other protocols. The rule:

1. Terms are added from the left, in the order of the models.
2. The sum has the dtype `accumulation_dtype`: float32 for 16- and 8-bit floats, float64 for wider floats. The first wider model
   changes the sum to float64.
3. Weights are float64 numbers. A term is the product of x and its weight, both converted to the sum's dtype. The product is
   rounded, then the sum is rounded. There is no fused multiply-add, because it would depend on the end of a vector loop.
4. For a mean, the sum is divided once by Σ wᵢ, which is added in float64.
5. The quotient is rounded once, to the output's dtype.

Each element is computed by itself, so the bits depend on neither chunks nor threads. The mean of copies of one model is that
model, bit for bit, because n · x is exact in the sum's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of these dtypes are summed: float32 for 16- and 8-bit floats, else float64.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.bfloat16, torch.float32)
    (torch.float32, torch.float64)
    """
    if any(dtype.is_complex for dtype in dtypes):
        return torch.complex128
    return torch.float64 if any(dtype.itemsize >= 4 for dtype in dtypes) else torch.float32


def total_weight(weights: Iterable[float]) -> float:
    """Return Σ wᵢ, added from the left in float64. (Python's `sum` compensates from version 3.12 on, and not before.)"""
    total = 0.0
    for weight in weights:
        total += weight
    return total


def term(values: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """Return weight · values in `dtype`, as a new tensor."""
    product = values.detach().to(dtype, copy=True)
    return product if weight == 1 else product.mul_(weight)


def divide_(total: Tensor, divisor: float) -> Tensor:
    """Divide a sum in place, and return it.

    The divisor is a tensor on the sum's device: CUDA multiplies by the reciprocal of a plain number.
    """
    if divisor == 1:
        return total
    return total.div_(torch.tensor(divisor, dtype=torch.float64).to(total.device, total.dtype))


_ORDER = (torch.float32, torch.float64, torch.complex128)


class Sum:
    """Σ wᵢxᵢ of one tensor, added one model at a time; see the module's rule.

    Args:
        dtype: the narrowest dtype to sum in; the rule's when `None`.

    >>> total = Sum(); total.add(torch.tensor([1.0])); total.add(torch.tensor([4.0]), 0.5)
    >>> total.quotient(2.0)
    tensor([1.5000], dtype=torch.float64)
    """

    __slots__ = ("_dtypes", "total")

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtypes = () if dtype is None else (dtype,)
        self.total: Tensor | None = None

    def _wide(self, values: Tensor) -> torch.dtype:
        """Return the dtype that the sum has once these values are in it."""
        held = () if self.total is None else (self.total.dtype,)
        return max((accumulation_dtype(values.dtype), *self._dtypes, *held), key=_ORDER.index)

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Add `weight` times a tensor, which is not changed."""
        wide = self._wide(values)
        if self.total is None:
            self.total = term(values, weight, wide)
            return
        # Without a weight there is no product to round, and torch converts while it adds.
        product = values.detach() if weight == 1 else term(values, weight, wide)
        self.total = self.total.to(wide).add_(product.to(self.total.device))

    def quotient(self, divisor: float = 1.0) -> Tensor:
        """Return the sum so far, divided, in the sum's dtype and in memory of its own.

        Raises:
            ValueError: nothing was added.
        """
        if self.total is None:
            raise ValueError("nothing was added")
        return divide_(self.total.clone(), divisor)

    def quotient_with(self, values: Tensor, weight: float, divisor: float) -> Tensor:
        """Return the value of `quotient` after `add(values, weight)`, without adding."""
        wide = self._wide(values)
        product = term(values, weight, wide)
        if self.total is None:
            return divide_(product, divisor)
        return divide_(product.to(self.total.device).add_(self.total.to(wide)), divisor)
