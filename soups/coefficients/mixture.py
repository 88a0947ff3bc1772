"""A mixture of a base model and task vectors, or of whole models, with coefficients that can be fitted.

    θ = θ₀ + Σᵢ λᵢ (θᵢ − θ₀)   with a base model,        θ = Σᵢ λᵢ θᵢ   without.

Models are read one tensor at a time, so memory is the mixed model and one tensor of one model, however many there are. The
derivative of a loss by a coefficient is an inner product, ∂L/∂λᵢ = ⟨∂L/∂θ, ∂θ/∂λᵢ⟩, summed over the elements that the
coefficient multiplies; it streams the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from soups.coefficients.granularity import CoefficientBlock, assign_rows
from soups.coefficients.links import find_link
from soups.errors import ConfigError
from soups.reduction import accumulation_dtype
from soups.stores import Checkpoint, Store, open_store
from soups.stores.store import headers
from soups.weights import Weights, check_same, hash_weights, is_averaged


class Mixture:
    """Models mixed with coefficients.

    Floating tensors are mixed, in float64 (float32 for 16-bit weights), and rounded once to their dtype. Other tensors are
    the base model's, or the first model's. Tied tensors are mixed once and stay tied. Stores that the mixture opened are
    closed by `close`, or at the end of a `with` block; those it was given stay open.

    Args:
        base: the base model, or None to mix whole models.
        models: the experts, by name or in a sequence; whatever `open_store` takes.
        granularity: "model", "group", "tensor", "column" or "element": what has a coefficient of its own.
        link: "none", "clamp" (to [0, 1], in the forward pass), "softmax" (over the models) or "sigmoid".
        start: the coefficients at the start; when None 0.3 with a base model, else equal shares.
        groups: for granularity "group": see `assign_rows`.

    Attributes:
        names: of the models.
        free: what an optimiser moves: float64 (rows, models), a leaf tensor that wants gradients.
        keys: the mixed tensors, tied ones once.
        rows: which rows of `free` belong to which tensor.

    Raises:
        ConfigError: no models, or settings that do not exist.
        soups.errors.WeightsError: the models do not fit each other.

    >>> base, expert = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    >>> Mixture(base, {"a": expert}, start=0.5).weights()["w"]
    tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        base: Checkpoint | None,
        models: Mapping[str, Checkpoint] | Sequence[Checkpoint],
        *,
        granularity: str = "model",
        link: str = "none",
        start: float | None = None,
        groups: str | Sequence[str] | None = None,
    ) -> None:
        named = dict(models) if isinstance(models, Mapping) else {str(n): one for n, one in enumerate(models)}
        if not named:
            raise ConfigError("A mixture needs at least one model.")
        self.names = list(named)
        self.granularity, self.link = granularity, link
        self._link = find_link(link)
        self._opened: list[Store] = []
        try:
            self.stores = [self._open(one) for one in named.values()]
            self.base = None if base is None else self._open(base)
            donor = self.base or self.stores[0]
            expected = headers(donor)
            for name, store in zip(self.names, self.stores, strict=True):
                check_same(expected, headers(store), where=name)
            self._donor, self._tied, self._order = donor, donor.tied(), donor.keys()
            self._aliases: dict[str, list[str]] = {}
            for name, key in self._tied.items():
                self._aliases.setdefault(key, []).append(name)
            self.keys = [key for key in self._order if key not in self._tied and is_averaged(expected[key])]
            self.rows = assign_rows({key: donor.meta(key) for key in self.keys}, granularity, groups)
            count = len(self.stores)
            if start is None:
                start = 0.3 if self.base is not None and link != "softmax" else 1 / count
            value = self._link.inverse(float(start), count)
            self.free = torch.full((self.rows.count, count), value, dtype=torch.float64, requires_grad=True)
        except BaseException:
            self.close()
            raise

    def _open(self, place: Checkpoint) -> Store:
        if isinstance(place, Store):
            return place
        self._opened.append(open_store(place))
        return self._opened[-1]

    def close(self) -> None:
        """Close the stores that the mixture opened."""
        for store in self._opened:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def coefficients(self) -> Tensor:
        """Return the coefficients λ, float64 (rows, models), detached."""
        return self._link.forward(self.free.detach())

    def set(self, values: Sequence[float] | Tensor) -> None:
        """Set the free parameters, given row by row.

        Raises:
            ConfigError: another number of values than there are parameters.
        """
        found = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
        if found.numel() != self.free.numel():
            raise ConfigError(f"{found.numel()} values were given for {self.free.numel()} coefficients.")
        with torch.no_grad():
            self.free.copy_(found.reshape(self.free.shape))

    def at(self, values: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """Return the mixed weights with these free parameters, given row by row."""
        self.set(values)
        return self.weights()

    def by_tensor(self) -> dict[str, dict[str, float]]:
        """Return each tensor's coefficient by model; the mean over columns or elements where there are several."""
        found = self.coefficients()
        return {
            key: {
                name: float(found[block.start : block.start + block.count, number].mean())
                for number, name in enumerate(self.names)
            }
            for key, block in self.rows.blocks.items()
        }

    def overall(self) -> list[float]:
        """Return each model's mean coefficient, every tensor weighed by its number of elements."""
        found = self.coefficients()
        sizes = torch.tensor([self._donor.meta(key).numel for key in self.keys], dtype=torch.float64)
        means = torch.stack(
            [found[block.start : block.start + block.count].mean(0) for block in self.rows.blocks.values()]
        )
        return ((means * sizes[:, None]).sum(0) / sizes.sum()).tolist()

    def moving(self) -> list[str]:
        """Return the mixed tensors that the coefficients change: where some model differs from the base, or from the first."""
        found: list[str] = []
        for key in self.keys:
            first = self._donor.read(key)
            if any(not torch.equal(store.read(key), first) for store in self.stores if store is not self._donor):
                found.append(key)
            elif self.base is None and self.link != "softmax":
                found.append(key)  # the coefficients need not sum to 1
        return found

    def identity(self) -> list[object]:
        """Return what tells this mixture from another: the models' files or contents, the granularity and the link."""
        stores = [*self.stores, *([] if self.base is None else [self.base])]
        files = [[store.identity(key) or _digest(store, key) for key in self.keys] for store in stores]
        return [self.names, self.granularity, self.link, self.rows.names, self.base is None, files]

    def weights(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the mixed weights.

        Args:
            into: weights that an earlier call returned, to be overwritten.
        """
        result = {} if into is None else into
        found = self.coefficients()
        for key in self._order:
            if key in self._tied:
                result[key] = result[self._tied[key]]
            elif key not in self.rows.blocks:
                result.setdefault(key, self._donor.read(key).clone())
            else:
                total = self._mixed(key, found)
                if into is None:
                    result[key] = total.to(self._donor.meta(key).dtype)
                else:
                    result[key].copy_(total)
        return result

    def _mixed(self, key: str, coefficients: Tensor) -> Tensor:
        """Return one mixed tensor in the dtype of the accumulation."""
        wide, block = accumulation_dtype(self._donor.meta(key).dtype), self.rows.blocks[key]
        if self.base is not None:
            start = self.base.read(key).to(wide)
            total = start.clone()
            for number, store in enumerate(self.stores):
                _add_scaled(total, store.read(key).to(wide, copy=True).sub_(start), block, coefficients, number)
            return total
        total = self.stores[0].read(key).to(wide, copy=True).mul_(_factor(block, coefficients, 0, wide))
        for number, store in enumerate(self.stores[1:], start=1):
            _add_scaled(total, store.read(key), block, coefficients, number)
        return total

    def backward(self, by_tensor: Weights) -> None:
        """Set the gradient of `free` from the loss' gradient by the mixed tensors.

        Args:
            by_tensor: by tensor name, a tied tensor under any one of its names; tensors that are left out count as zero.
        """
        slope = torch.zeros_like(self.free, requires_grad=False)
        for key, block in self.rows.blocks.items():
            name = next((name for name in (key, *self._aliases.get(key, ())) if name in by_tensor), None)
            if name is None:
                continue
            gradient = by_tensor[name].detach().cpu().double().reshape(-1)
            start = None if self.base is None else self.base.read_flat(key).double()
            for number, store in enumerate(self.stores):
                vector = store.read_flat(key).double()
                if start is not None:
                    vector = vector - start
                slope[block.start : block.start + block.count, number] += _reduced(gradient, vector, block)
        self.free.grad = None
        self._link.forward(self.free).backward(slope)

    def penalise(self, penalty: Callable[[Tensor], Tensor]) -> float:
        """Add the gradient of a function of the coefficients to that of `free`; return its value."""
        value = penalty(self._link.forward(self.free))
        value.backward()
        return float(value.detach())


def _digest(store: Store, key: str) -> str:
    return hash_weights({key: store.read(key)})


def _factor(block: CoefficientBlock, coefficients: Tensor, number: int, dtype: torch.dtype) -> float | Tensor:
    if not block.shape:
        return float(coefficients[block.start, number])
    return block.of(coefficients, number).to(dtype)


def _add_scaled(total: Tensor, vector: Tensor, block: CoefficientBlock, coefficients: Tensor, number: int) -> None:
    factor = _factor(block, coefficients, number, total.dtype)
    if isinstance(factor, float):
        total.add_(vector, alpha=factor)
    else:
        total.add_(vector.to(total.dtype) * factor)


def _reduced(gradient: Tensor, vector: Tensor, block: CoefficientBlock) -> Tensor:
    """Return ⟨gradient, vector⟩ summed over what each coefficient of the block multiplies, (rows of the block,)."""
    if not block.shape:
        return (gradient @ vector).reshape(1)
    product = gradient * vector
    return product if block.count == product.numel() else product.reshape(-1, block.count).sum(0)
