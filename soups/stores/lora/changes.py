"""What an adapter does to one tensor of its base: W' = W + s·B A, and its relatives.

LoRA is arXiv:2106.09685 (section 4.1), DoRA arXiv:2402.09353 (equation 5), PiSSA arXiv:2404.02948, OLoRA arXiv:2406.01775. Weights
are float32 or float64 here, and rounded once by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from soups.errors import WeightsError

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
Layout = Literal["linear", "transposed", "embedding", "conv"]


class Change(Protocol):
    """One step from a base tensor to the adapted one."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        ...

    def shape(self, shape: Shape) -> Shape:
        """Return the shape after the step, given the one before."""
        ...

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the tensor after the step.

        Args:
            weight: the tensor before the step.
            read: reads a tensor of the adapter in the dtype of the arithmetic.
            dtype: of the base's tensor.
        """
        ...


@dataclass(frozen=True)
class Replace:
    """A tensor that was trained in full."""

    key: str
    new_shape: Shape

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return (self.key,)

    def shape(self, shape: Shape) -> Shape:
        """Return the trained tensor's shape."""
        del shape
        return self.new_shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the trained tensor."""
        del weight, dtype
        return read(self.key)


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that were trained (`trainable_token_indices`)."""

    key: str
    rows: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return (self.key,)

    def shape(self, shape: Shape) -> Shape:
        """Return the same shape.

        Raises:
            WeightsError: a row that the tensor does not have.
        """
        if len(shape) != 2 or (self.rows and max(self.rows) >= shape[0]):
            raise WeightsError(f"{self.key!r} trains row {max(self.rows)} of a tensor of shape {shape}.")
        return shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the tensor with the trained rows."""
        del dtype
        return weight.index_copy(0, torch.tensor(self.rows), read(self.key))


@dataclass(frozen=True)
class Shift:
    """A bias of the second factor (`lora_bias`): b' = b + s·β."""

    key: str
    scale: float

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return (self.key,)

    def shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the shifted bias."""
        del dtype
        return weight + self.scale * read(self.key)


@dataclass(frozen=True)
class LowRank:
    """A product of two factors, with DoRA's magnitudes where there are such.

    Attributes:
        first, second: A (rank × in) and B (out × rank), with a kernel's axes behind where the module is a convolution.
        scale: s.
        layout: how the base keeps the weight: (out, in), (in, out), an embedding's (tokens, features), or a kernel.
        magnitude: DoRA's m, one number for each output.
        start: `"pissa"` or `"olora"`: the base loses the product that training started from.
        rank: of the starting product.
        blocks: how many blocks A and B are, on a diagonal (BD-LoRA).
    """

    first: str
    second: str
    scale: float
    layout: Layout
    magnitude: str | None = None
    start: str | None = None
    rank: int = 0
    blocks: tuple[int, int] = (1, 1)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return (self.first, self.second, *([self.magnitude] if self.magnitude else []))

    def shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return W + s·B A, or m ∘ (W + s·B A)/‖W + s·B A‖ with a norm for each output."""
        across = self.layout in ("transposed", "embedding")
        if self.start:
            weight = _without_start(weight.T if across else weight, self.start, self.rank, self.scale, dtype)
            weight = weight.T if across else weight
        first, second = (
            block_diagonal(read(self.first), self.blocks[0]),
            block_diagonal(read(self.second), self.blocks[1]),
        )
        product = second.flatten(1) @ first.flatten(1)
        adapted = weight + self.scale * (product.T if across else product).reshape(weight.shape)
        if not self.magnitude:
            return adapted
        axis = 1 if across else 0
        norm = adapted.movedim(axis, 0).flatten(1).norm(dim=1)
        factor = read(self.magnitude).flatten() / norm
        return adapted * factor.reshape([-1 if at == axis else 1 for at in range(adapted.ndim)])


def block_diagonal(factor: Tensor, count: int) -> Tensor:
    """Return a factor whose rows are kept as `count` blocks of a diagonal (BD-LoRA)."""
    return torch.block_diag(*factor.chunk(count)) if count > 1 else factor


def _without_start(weight: Tensor, start: str, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the base's weight without the product that training started from, rounded as the base keeps it."""
    if start == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        product = (u[:, :rank] * s[:rank]) @ v[:rank]
    else:
        q, r = torch.linalg.qr(weight)
        product = scale * (q[:, :rank] @ r[:rank])
    return (weight - product).to(dtype).to(weight.dtype)


@dataclass(frozen=True)
class Experts:
    """A product for each expert of a stacked parameter (`target_parameters`), or for a piece of one.

    A has the shape (experts · rank, in) with an expert's rows together; B has (out, rank · experts) with a rank's columns
    together.

    Attributes:
        first, second: A and B.
        scale: s.
        count: how many experts.
        transposed: the parameter has the shape (experts, in, out) instead of (experts, out, in).
        expert: the only expert that the base's tensor holds; None where it holds all.
        part, parts: which of so many equal parts of the outputs the base's tensor holds.
    """

    first: str
    second: str
    scale: float
    count: int
    transposed: bool
    expert: int | None = None
    part: int = 0
    parts: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return (self.first, self.second)

    def shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return W_e + s·B_e A_e for every expert e."""
        del dtype
        first, second = read(self.first), read(self.second)
        first = first.reshape(self.count, -1, first.shape[-1])
        second = second.reshape(second.shape[0], -1, self.count).permute(2, 0, 1)
        if self.expert is not None:
            first, second = first[self.expert], second[self.expert].chunk(self.parts)[self.part]
        product = second @ first
        return weight + self.scale * (product.transpose(-2, -1) if self.transposed else product)


@dataclass(frozen=True)
class OneExpert:
    """A change of one expert's matrix, which the base keeps in a stack with others.

    Attributes:
        change: of the matrix.
        expert: its number in the stack.
        part, parts: which of so many equal parts of the stack's second axis it is.
    """

    change: LowRank
    expert: int
    part: int
    parts: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """The adapter's tensors that it needs."""
        return self.change.tensors

    def shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def apply(self, weight: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the stack with one matrix changed."""
        whole = weight.clone()
        own = whole[self.expert].chunk(self.parts)[self.part]
        own.copy_(self.change.apply(own.clone(), read, dtype))
        return whole
