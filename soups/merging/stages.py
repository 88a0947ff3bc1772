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
from soups.merging import kernels
from soups.merging.kernels import Choice, absolute
from soups.merging.method import Scope, WholeModelMethod, as_mask, one_of, per_model, weighted_sum
from soups.merging.noise import masked_
from soups.merging.operands import BlockSum, Chunk, HeldOperands, Operands, Unit
from soups.merging.selection import Cut, Map, Stream, cut_at, exact_cut, held_cut, tensor_cut


class Transform(ABC):
    """What is done to each task vector by itself."""

    unit: Unit = "element"
    revisits: ClassVar[bool] = True
    """Whether it looks at a task vector more often than it changes it, so that keeping one in memory pays."""

    @property
    def scope(self) -> Scope:
        """How far away an element can be and still matter."""
        return self.unit

    def observe(self, operands: Operands) -> Sequence[Any]:
        """Look at one tensor of all models before `apply`; return what was found for each."""
        return [None] * len(operands.models)

    @abstractmethod
    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the transformed stretch of a task vector; `delta` may be overwritten."""

    def choice(self, seen: Any, chunk: Chunk, count: int, model: int) -> Choice | None:
        """Return what `apply` does to the `count` elements of a chunk, if a compiled loop can do that, else `None`.

        The task vector, if it is needed, is `chunk.delta(model)`.
        """
        return None


def choices_of(transform: Transform, states: Sequence[Any], chunk: Chunk) -> list[Choice] | None:
    """Return each model's `Transform.choice`, or `None` if there is one that a compiled loop cannot do."""
    choices: list[Choice] = []
    for model, state in enumerate(states):
        choice = transform.choice(state, chunk, chunk.size, model)
        if choice is None:
            return None
        choices.append(choice)
    return choices


class WholeModelTransform(Transform):
    """A transform that looks at a whole model, if its scope is "model"."""

    @abstractmethod
    def observe_all(self, operands: Sequence[Operands], model: int, map: Map) -> Any:
        """Look at every tensor of one model."""


@dataclass(frozen=True)
class Keep(Transform):
    """Leave task vectors as they are."""

    revisits = False

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Return the task vector."""
        return delta

    def choice(self, seen: Any, chunk: Chunk, count: int, model: int) -> Choice:
        """Everything."""
        return Choice()


def magnitudes(operands: Operands) -> Stream:
    """Return the stream of |τ| of the only model in `operands`."""
    return lambda: (absolute(chunk.deltas()[0]) for chunk in operands)


def tensor_cuts(operands: Operands, ranks: Sequence[int], *, exact: bool) -> list[Cut]:
    """Return, for each k in `ranks`, the cut that keeps the k largest |τ| of the only model in `operands`."""
    if isinstance(operands, HeldOperands) and operands.rows.device.type == "cpu":
        return held_cut(operands.rows[0], ranks, exact=exact)
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

    def observe(self, operands: Operands) -> list[Cut]:
        """Find this tensor's cut in each model."""
        ranks = [self._rank(model, operands.numel) for model in range(len(operands.models))]
        return [tensor_cuts(operands.only(i), [rank], exact=self.exact)[0] for i, rank in enumerate(ranks)]

    def observe_all(self, operands: Sequence[Operands], model: int, map: Map) -> Cut:
        """Find the model's cut."""
        total = sum(one.numel for one in operands)
        return model_cut(operands, self._rank(model, total), map)

    def apply(self, delta: Tensor, seen: Any, chunk: Chunk, model: int) -> Tensor:
        """Set what is below the cut to zero."""
        return seen.keep_(delta, chunk.start)

    def choice(self, seen: Cut, chunk: Chunk, count: int, model: int) -> Choice:
        """Set what is below the cut to zero."""
        first, second, place = seen.limits(count, chunk.start)
        return Choice((first, second, float("inf"), float("inf")), (place, 0))


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
    def revisits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner transform does."""
        return self.inner.revisits

    @property
    def scope(self) -> Scope:
        """A tensor: its norms decide."""
        return "tensor"

    def observe(self, operands: Operands) -> list[Rescaled]:
        """Measure the tensor's norm in each model before and after."""
        count = len(operands.models)
        states = self.inner.observe(operands)
        before = [BlockSum(operands.block) for _ in range(count)]
        after = [BlockSum(operands.block) for _ in range(count)]
        # An eighth of a byte an element; every model's masks are held at once.
        room = operands.held or operands.numel <= 4 * operands.room
        masks: list[Masks] = [{} for _ in range(count)]
        for chunk in operands:
            choices = choices_of(self.inner, states, chunk) if operands.compiled else None
            if choices is not None:
                wholes, lefts, kept = _norms(chunk, choices, operands.block, remember=room)
                for model, (whole, left) in enumerate(zip(wholes, lefts, strict=True)):
                    before[model].extend(whole)
                    after[model].extend(left)
                    if len(kept) and choices[model].mask is not None:
                        masks[model][chunk.start] = kept[model]
                continue
            for model, delta in enumerate(chunk.deltas()):
                before[model].add_magnitudes(delta)
                left = self.inner.apply(delta, states[model], chunk, model)
                after[model].add_magnitudes(left)
                if operands.held and not operands.compiled:
                    delta.copy_(left)
                    masks[model][chunk.start] = None
                elif room:
                    masks[model][chunk.start] = np.packbits(left.cpu().numpy() != 0, bitorder="little")
        ratios = [a.value() / b.value() if b.value() > 0 else 1.0 for a, b in zip(before, after, strict=True)]
        return [Rescaled(*one) for one in zip(states, ratios, masks, strict=True)]

    def apply(self, delta: Tensor, seen: Rescaled, chunk: Chunk, model: int) -> Tensor:
        """Transform, then multiply by the ratio."""
        if chunk.start not in seen.masks:
            delta = self.inner.apply(delta, seen.state, chunk, model)
        elif (mask := seen.masks[chunk.start]) is not None:
            delta = masked_(delta, np.unpackbits(mask, count=delta.numel(), bitorder="little"))
        return delta.mul_(seen.ratio)

    def choice(self, seen: Rescaled, chunk: Chunk, count: int, model: int) -> Choice | None:
        """Transform, then multiply by the ratio."""
        mask = seen.masks.get(chunk.start)
        if mask is not None:
            return Choice(mask=mask, factor=seen.ratio)
        choice = self.inner.choice(seen.state, chunk, count, model)
        return choice and choice._replace(factor=seen.ratio)


def _norms(chunk: Chunk, choices: Sequence[Choice], block: int, *, remember: bool) -> tuple[Tensor, Tensor, list[Any]]:
    """Return the sums of |τ| of a chunk's blocks before and after, and the masks if they are wanted and there are any."""
    rows, base = chunk.for_loops()
    wanted = remember and any(choice.mask is not None for choice in choices)
    kept = list(np.empty((chunk.count if wanted else 0, -(-chunk.size // 8)), np.uint8))
    return (*kernels.block_norms(rows, base, choices, chunk.size, block, kept), kept)


Masks = dict[int, kernels.Bits | None]
"""Which elements were left, by where a chunk begins, packed; `None` where that was done in place."""


class Rescaled(NamedTuple):
    """What `KeepNorm` found in one tensor of one model.

    Attributes:
        state: what the inner transform found.
        ratio: of the norms before and after.
        masks: what was left of chunks, as far as that is remembered.
    """

    state: Any
    ratio: float
    masks: Masks


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
        held: the task vectors, shape (models, n), where there was room for them.
        transformed: whether those are transformed already.
    """

    states: Sequence[Any]
    majority: float = 1.0
    held: Tensor | None = None
    transformed: bool = True


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
    loops: ClassVar[bool] = True
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
        source = operands.hold() if self.transform.revisits or not operands.compiled else None
        if source is None:
            return Seen(self.transform.observe(operands))
        states = self.transform.observe(source)
        if operands.compiled:  # and then transforming is a part of the loop that merges
            return Seen(states, held=source.rows, transformed=False)
        for chunk in source:
            for model, delta in enumerate(chunk.deltas()):
                tau = self.transform.apply(delta, states[model], chunk, model)
                if tau is not delta:
                    delta.copy_(tau)
        return Seen(states, held=source.rows)

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
        states = seen.states if seen is not None else [None] * chunk.count
        if seen is not None and seen.held is not None:
            taus = list(seen.held[:, chunk.start : chunk.start + chunk.size])
            if seen.transformed:
                return taus
            return [self.transform.apply(tau.clone(), states[i], chunk, i) for i, tau in enumerate(taus)]
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
        choices = self._choices(chunk, seen)
        if choices is not None:
            return self._compiled(chunk, seen, choices, weights)
        if self.consensus is None:
            merged = self._plain(self._transformed(chunk, seen), weights)
        else:
            merged = self._agreed(*self._vote(chunk, seen), weights, seen.majority if seen is not None else 1.0)
        if self.scale != 1:
            merged.mul_(self.scale)
        assert chunk.base is not None
        return merged.add_(chunk.base)

    def _choices(self, chunk: Chunk, seen: Seen | None) -> list[Choice] | None:
        """Return what the transform does to each model's chunk, if all that can be one compiled loop."""
        if not chunk.compiled or (seen is not None and seen.held is not None and seen.transformed):
            return None
        return choices_of(self.transform, [None] * chunk.count if seen is None else seen.states, chunk)

    def _compiled(self, chunk: Chunk, seen: Seen | None, choices: list[Choice], weights: list[float]) -> Tensor:
        if seen is not None and seen.held is not None:
            rows, base = list(seen.held[:, chunk.start : chunk.start + chunk.size]), None
        else:
            rows, base = chunk.for_loops()
        elect, total = self.consensus, sum(weights)
        ties = {"plus": 1, "none": 0, "majority": int(seen.majority) if seen is not None else 1}
        mean = self.reduce == "mean" and elect is None and abs(total) >= 1e-8
        origin = chunk.base if base is None else base
        assert origin is not None
        return kernels.task_vectors(
            rows,
            origin,
            choices,
            weights,
            chunk.size,
            deltas=base is None,
            vote=None if elect is None else elect.weighted,
            tie=ties[elect.zero] if elect is not None else 0,
            reduce=2 if self.reduce == "count" else int(self.reduce == "mean" and elect is not None),
            denominator=total if mean else 1.0,
            factor=self.scale,
            into=chunk.into,
        )

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
