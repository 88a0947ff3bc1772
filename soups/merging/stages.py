"""Merging as a product of stages: transform each task vector, agree on signs, reduce, scale.

θ = θ_0 + λ · reduce(consensus(transform(τ_1), …, transform(τ_T))),  τ_t = θ_t − θ_0.

Task arithmetic, TIES, DARE, DELLA and Breadcrumbs, and the variants that public codes made of them, are settings of
`TaskVectors`. Each transform states its scope; what needs a whole tensor or model is looked up in a pass of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.method import Scope, WholeModelMethod, as_mask, one_of, per_model, weighted_sum
from soups.merging.operands import BlockSum, Chunk, HeldOperands, Operands, Unit, absolute
from soups.merging.selection import Cut, Map, Stream, cut_at, exact_cut, held_cut, tensor_cut


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

    @abstractmethod
    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the transformed stretch of a task vector; `delta` may be overwritten."""


class WholeModelTransform(Transform):
    """A transform that looks at a whole model, if its scope is "model"."""

    @abstractmethod
    def observe_all(self, operands: Sequence[Operands], model: int, map: Map) -> Any:
        """Look at every tensor of one model."""


@dataclass(frozen=True)
class Keep(Transform):
    """Leave task vectors as they are."""

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the task vector."""
        return delta


def magnitudes(operands: Operands) -> Stream:
    """Return the stream of |τ| of the only model in `operands`."""
    return lambda: (absolute(chunk.deltas()[0]) for chunk in operands)


def tensor_cuts(operands: Operands, ranks: Sequence[int], *, exact: bool) -> list[Cut]:
    """Return, for each k in `ranks`, the cut that keeps the k largest |τ| of the only model in `operands`."""
    if isinstance(operands, HeldOperands) and operands.delta.device.type == "cpu":
        return held_cut(operands.delta, ranks, exact=exact)
    select = exact_cut if exact else tensor_cut
    return select(magnitudes(operands), ranks, operands.numel, dtype=operands.dtype, room=operands.room)


@dataclass(frozen=True)
class Trim(WholeModelTransform):
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
        density = one_of(self.density, model, share="density")
        return total if density == 1 else max(int(density > 0), int(density * total)) + self.extra

    def observe(self, operands: Operands, model: int) -> Cut:
        """Find this tensor's cut."""
        return tensor_cuts(operands, [self._rank(model, operands.numel)], exact=self.exact)[0]

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

    def observe(self, operands: Operands, model: int) -> tuple[Any, float, Masks | None]:
        """Measure the tensor's norm before and after."""
        seen = self.inner.observe(operands, model)
        before, after = BlockSum(operands.block), BlockSum(operands.block)
        # An eighth of a byte an element; every model's masks are held at once.
        masks: Masks | None = {} if operands.held or operands.numel <= 4 * operands.room else None
        for chunk in operands:
            (delta,) = chunk.deltas()
            before.add_magnitudes(delta)
            left = self.inner.apply(delta, seen, chunk, model)
            after.add_magnitudes(left)
            if operands.held:
                if left is not delta:
                    delta.copy_(left)
            elif masks is not None:
                masks[chunk.start] = np.packbits(left.cpu().numpy() != 0)
        total = after.value()
        return seen, before.value() / total if total > 0 else 1.0, masks

    def apply(self, delta: Tensor, seen: tuple[Any, float, Masks | None], chunk: Chunk, model: int) -> Tensor:
        """Transform, then multiply by the ratio."""
        inner, ratio, masks = seen
        if masks is None:
            return self.inner.apply(delta, inner, chunk, model).mul_(ratio)
        if chunk.start in masks:
            kept = torch.from_numpy(np.unpackbits(masks[chunk.start], count=delta.numel()))
            delta.mul_(kept.to(delta.device, delta.dtype))
        return delta.mul_(ratio)


Masks = dict[int, "np.ndarray[tuple[int], np.dtype[np.uint8]]"]
"""Which elements were left, by where a chunk begins, packed; nothing where that was done in place."""


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


class Seen(NamedTuple):
    """What a look at a tensor, or at the model, found.

    Attributes:
        states: each transform's.
        majority: the sign that ties between signs get.
        held: the transformed task vectors, where there was room for them.
    """

    states: list[Any]
    majority: float = 1.0
    held: list[Tensor] | None = None


@dataclass(frozen=True)
class TaskVectors(WholeModelMethod):
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

    def observe(self, operands: Operands) -> Seen:
        """Look at each model's tensor by itself, and transform it at once where there is room to keep it."""
        held = operands.hold()
        if held is None:
            return Seen([self.transform.observe(operands.only(i), i) for i in range(len(operands.models))])
        for model, one in enumerate(held):
            state = self.transform.observe(one, model)
            for chunk in one:
                (delta,) = chunk.deltas()
                tau = self.transform.apply(delta, state, chunk, model)
                if tau is not delta:
                    delta.copy_(tau)
        return Seen([], held=[one.delta for one in held])

    def observe_all(self, operands: Sequence[Operands], map: Map) -> Seen:
        """Look at each model by itself, then at the signs' majority where it is asked for."""
        transform = self.transform
        if not isinstance(transform, WholeModelTransform) or transform.scope != "model":
            raise ConfigError("A majority over the model needs a transform of scope model; use zero='plus' or 'none'.")
        count = len(operands[0].models)
        seen = Seen([transform.observe_all([one.only(i) for one in operands], i, map) for i in range(count)])
        if self.consensus is None or self.consensus.zero != "majority":
            return seen
        total = sum(map(lambda one: sum(int(torch.sign(self._vote(c, seen)[1]).sum()) for c in one), operands))
        return seen._replace(majority=1.0 if total > 0 else -1.0)

    def _transformed(self, chunk: Chunk, seen: Seen | None) -> list[Tensor]:
        if seen is not None and seen.held is not None:
            assert chunk.base is not None
            stop = chunk.start + chunk.base.numel()
            return [tau[chunk.start : stop] for tau in seen.held]
        states = seen.states if seen is not None else [None] * chunk.count
        return [self.transform.apply(delta, states[i], chunk, i) for i, delta in enumerate(chunk.deltas())]

    def _vote(self, chunk: Chunk, seen: Seen | None) -> tuple[list[Tensor], Tensor]:
        """Return the transformed task vectors, weighted if weights vote, and the sum that decides the sign."""
        taus = self._transformed(chunk, seen)
        if self.consensus is not None and self.consensus.weighted:
            for tau, weight in zip(taus, per_model(self.weight, len(taus)), strict=True):
                if weight != 1:
                    tau.mul_(weight)
        vote = taus[0].clone()
        for tau in taus[1:]:
            vote += tau
        return taus, vote

    def combine(self, chunk: Chunk, seen: Seen | None) -> Tensor:
        """Return the merged chunk."""
        weights = per_model(self.weight, chunk.count)
        if self.consensus is None:
            merged = self._plain(self._transformed(chunk, seen), weights)
        else:
            merged = self._agreed(*self._vote(chunk, seen), weights, seen.majority if seen is not None else 1.0)
        if self.scale != 1:
            merged.mul_(self.scale)
        assert chunk.base is not None
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
            agreeing = tau.mul_(sign).relu_()
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


def mergekit_form(
    transform: Transform,
    *,
    weight: float | tuple[float, ...],
    scale: float,
    normalize: bool,
    rescale: bool,
    elect: bool,
) -> TaskVectors:
    """Return what mergekit makes of a transform, in all methods of its task arithmetic.

    Args:
        transform: what is done to each task vector.
        weight: one for all models or one for each; they vote.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights, of those that agree if there is an election.
        rescale: restore each task vector's L1 norm, tensor by tensor.
        elect: elect signs, plus where the sum is zero.
    """
    return TaskVectors(
        KeepNorm(transform) if rescale else transform,
        weight,
        Elect(weighted=True, zero="plus") if elect else None,
        "mean" if normalize else "sum",
        scale,
    )
