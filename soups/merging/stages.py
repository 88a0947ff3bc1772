"""Merging as a product of stages: transform each task vector, agree on signs, reduce, scale.

θ = θ_0 + λ · reduce(consensus(transform(τ_1), …, transform(τ_T))),  τ_t = θ_t − θ_0.

Task arithmetic, TIES, DARE, DELLA and Breadcrumbs, and the variants that public codes made of them, are settings of
`TaskVectors`. Each transform states its scope; what needs a whole tensor or model is looked up in a pass of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from soups.errors import ConfigError
from soups.merging.method import Method, Scope, as_mask, per_model, weighted_sum
from soups.merging.operands import BlockSum, Chunk, Operands, Unit
from soups.merging.selection import Cut, Map, Stream, cut_at, exact_cut, tensor_cut


class Transform(ABC):
    """What is done to each task vector by itself."""

    unit: Unit = "element"

    @property
    def scope(self) -> Scope:
        """How far away an element can be and still matter."""
        return self.unit

    def observe(self, operands: Operands, model: int) -> Any:
        """Look at one tensor of one model (`operands` holds that model alone)."""
        return None

    def observe_all(self, operands: Sequence[Operands], model: int, map: Map) -> Any:
        """Look at every tensor of one model; called for scope model."""
        raise NotImplementedError

    @abstractmethod
    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the transformed stretch of a task vector; `delta` may be overwritten."""


@dataclass(frozen=True)
class Keep(Transform):
    """Leave task vectors as they are."""

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the task vector."""
        return delta


def magnitudes(operands: Operands) -> Stream:
    """Return the stream of |τ| of the only model in `operands`."""
    return lambda: (chunk.deltas()[0].abs_() for chunk in operands)


@dataclass(frozen=True)
class Trim(Transform):
    """Keep the largest magnitudes (TIES, arXiv:2306.01708, section 4, step 1) and set the rest to zero.

    Attributes:
        density: the share to keep, one for all models or one for each.
        within: what the share is of: the whole model, as in the paper, or each tensor.
        exact: keep exactly int(density · n), the earlier of equal magnitudes first; otherwise everything that is at least
            as large as the int(density · n)-th, as the paper's code does.
        extra: keep this many more (the paper's code keeps int(density · n) + 1).
    """

    density: float | tuple[float, ...]
    within: Literal["model", "tensor"] = "model"
    exact: bool = False
    extra: int = 0

    @property
    def scope(self) -> Scope:
        """The whole model or the tensor."""
        return self.within

    def _rank(self, model: int, total: int) -> int:
        density = self.density if isinstance(self.density, int | float) else self.density[model]
        if not 0 <= density <= 1:
            raise ConfigError(f"density={density} is not between 0 and 1, the share of a task vector to keep.")
        return total if density == 1 else max(int(density > 0), int(density * total)) + self.extra

    def observe(self, operands: Operands, model: int) -> Cut:
        """Find this tensor's cut."""
        rank = self._rank(model, operands.numel)
        select = exact_cut if self.exact else tensor_cut
        return select(magnitudes(operands), [rank], operands.numel, dtype=operands.dtype, room=operands.room)[0]

    def observe_all(self, operands: Sequence[Operands], model: int, map: Map) -> Cut:
        """Find the model's cut."""
        total = sum(one.numel for one in operands)
        return model_cut(operands, self._rank(model, total), map)

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Set what is below the cut to zero."""
        return seen.keep(delta, chunk.start)


def model_cut(operands: Sequence[Operands], rank: int, map: Map) -> Cut:
    """Return the cut that keeps the `rank` largest |τ| of a whole model (and what equals the last of them)."""
    widest = torch.float64 if any(one.dtype == torch.float64 for one in operands) else torch.float32

    def stream(one: Operands) -> Stream:
        return lambda: (values.to(widest) for values in magnitudes(one)())

    total = sum(one.numel for one in operands)
    return cut_at([stream(one) for one in operands], [rank], total, dtype=widest, map=map)[0]


@dataclass(frozen=True)
class KeepNorm(Transform):
    """Multiply what another transform left by the ratio of L1 norms before and after it, tensor by tensor.

    This is what mergekit calls `rescale`; DARE's own factor is one over the density. The inner transform must only set
    elements to zero: what it left is remembered as a mask where there is room, so that its work is done once.
    """

    inner: Transform

    @property
    def unit(self) -> Unit:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the inner transform must see whole."""
        return self.inner.unit

    @property
    def scope(self) -> Scope:
        """A tensor: its norms decide."""
        return "tensor"

    def observe(self, operands: Operands, model: int) -> tuple[Any, float, Tensor | None]:
        """Measure the tensor's norm before and after."""
        seen = self.inner.observe(operands, model)
        before, after = BlockSum(operands.block), BlockSum(operands.block)
        masks: list[Tensor] = []
        # Every model's mask is held at once, a byte an element; ten models share the room.
        remember = 10 * operands.numel <= 2 * operands.room
        for chunk in operands:
            (delta,) = chunk.deltas()
            before.add_magnitudes(delta)
            left = self.inner.apply(delta, seen, chunk, model)
            after.add_magnitudes(left)
            if remember:
                masks.append(left.sign().abs_().to(torch.uint8))
        total = after.value()
        ratio = before.value() / total if total > 0 else 1.0
        return seen, ratio, torch.cat(masks) if masks else None

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Transform, then multiply by the ratio."""
        inner, ratio, mask = seen
        if mask is None:
            return self.inner.apply(delta, inner, chunk, model).mul_(ratio)
        return delta.mul_(mask[chunk.start : chunk.start + delta.numel()].to(delta.dtype)).mul_(ratio)


@dataclass(frozen=True)
class Elect:
    """Sign election (TIES, section 4, step 2): each element's sign is that of the sum, and who disagrees is left out.

    Attributes:
        weighted: whether weights vote too.
        zero: the sign where the sum is zero: plus, none (nobody agrees), or the whole model's majority, which the paper's
            code takes (and minus where that is zero as well).
    """

    weighted: bool = False
    zero: Literal["plus", "none", "majority"] = "none"


Reduce = Literal["sum", "mean", "count"]


@dataclass(frozen=True)
class TaskVectors(Method):
    """θ_0 + λ · reduce(consensus(transform(τ_t))).

    Attributes:
        transform: what is done to each task vector.
        weight: one for all models or one for each.
        consensus: sign election, or `None`.
        reduce: the weighted sum; or divided by the sum of the weights of those that agree; or by how many agree (an
            element that is zero agrees with nobody).
        scale: λ.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    transform: Transform = field(default_factory=Keep)
    weight: float | tuple[float, ...] = 1.0
    consensus: Elect | None = None
    reduce: Reduce = "sum"
    scale: float = 1.0

    @property
    def unit(self) -> Unit:
        """What the transform must see whole."""
        return self.transform.unit

    @property
    def scope(self) -> Scope:
        """The transform's scope; the model's where ties between signs are decided by the whole model."""
        majority = self.consensus is not None and self.consensus.zero == "majority"
        return "model" if majority else self.transform.scope

    def observe(self, operands: Operands) -> Any:
        """Look at each model's tensor by itself."""
        return [self.transform.observe(operands.only(i), i) for i in range(len(operands.models))], 1.0

    def observe_all(self, operands: Sequence[Operands], map: Map) -> Any:
        """Look at each model by itself, then at the signs' majority where it is asked for."""
        count = len(operands[0].models)
        if self.transform.scope == "model":
            seen = [self.transform.observe_all([one.only(i) for one in operands], i, map) for i in range(count)]
        else:
            raise ConfigError("A majority over the model needs a transform of scope model; use zero='plus' or 'none'.")
        if self.consensus is None or self.consensus.zero != "majority":
            return seen, 1.0
        total = sum(map(lambda one: sum(int(torch.sign(self._vote(c, seen)[1]).sum()) for c in one), operands))
        return seen, 1.0 if total > 0 else -1.0

    def _transformed(self, chunk: Chunk, seen: Sequence[Any]) -> list[Tensor]:
        return [self.transform.apply(delta, seen[i], chunk, i) for i, delta in enumerate(chunk.deltas())]

    def _vote(self, chunk: Chunk, seen: Sequence[Any]) -> tuple[list[Tensor], Tensor]:
        """Return the transformed task vectors, weighted if weights vote, and the sum that decides the sign."""
        taus = self._transformed(chunk, seen)
        if self.consensus is not None and self.consensus.weighted:
            taus = [tau * w for tau, w in zip(taus, per_model(self.weight, len(taus)), strict=True)]
        vote = taus[0].clone()
        for tau in taus[1:]:
            vote += tau
        return taus, vote

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        states, majority = seen if seen is not None else ([None] * chunk.count, 1.0)
        weights = per_model(self.weight, chunk.count)
        if self.consensus is None:
            merged = self._plain(self._transformed(chunk, states), weights)
        else:
            merged = self._agreed(*self._vote(chunk, states), weights, majority)
        if self.scale != 1:
            merged.mul_(self.scale)
        return merged.add_(chunk.base)

    def _plain(self, taus: list[Tensor], weights: list[float]) -> Tensor:
        if self.reduce == "count":
            count = sum(tau.sign().abs_() for tau in taus)
            assert isinstance(count, Tensor)
            return weighted_sum(weights, taus).div_(count.clamp_(min=1))
        total = weighted_sum(weights, taus)
        divisor = sum(weights)
        if self.reduce == "mean" and abs(divisor) >= 1e-8:
            total.div_(divisor)
        return total

    def _agreed(self, taus: list[Tensor], vote: Tensor, weights: list[float], majority: float) -> Tensor:
        assert self.consensus is not None
        sign = vote.sign_()
        if self.consensus.zero == "plus":
            sign.add_(0.5).sign_()
        elif self.consensus.zero == "majority":
            sign.add_(0.5 * majority).sign_()
        factors = [1.0] * len(taus) if self.consensus.weighted else weights
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for tau, factor, weight in zip(taus, factors, weights, strict=True):
            # |τ| where it has the elected sign, 0 elsewhere: multiplying by ±1 and by 0 is exact.
            agreeing = relu(tau.mul_(sign))
            if self.reduce != "sum":
                there = agreeing.sign()
                divisor += there if self.reduce == "count" else there.mul_(weight)
            total += agreeing if factor == 1 else agreeing.mul_(factor)
        total.mul_(sign)
        if self.reduce == "count":
            total.div_(divisor.clamp_(min=1))
        elif self.reduce == "mean":
            nobody = as_mask(divisor.abs() < 1e-8, divisor.dtype)
            total.div_(divisor.mul_(1 - nobody).add_(nobody))
        return total
