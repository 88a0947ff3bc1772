"""Merging in stages: transform each task vector, elect signs, reduce, scale.

θ = θ_0 + λ · reduce(consensus(transform(τ_1), …, transform(τ_T))),  τ_t = θ_t − θ_0.

Task arithmetic, TIES, DARE, DELLA, Breadcrumbs and their variants in public implementations are settings of `TaskVectors`. Each
transform states its scope. A transform that needs a whole tensor or model observes it in a separate pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging import kernels
from soups.merging.chunk import Chunk, Unit
from soups.merging.kernels import Choice
from soups.merging.method import PerModel, Scope, WholeModelMethod, as_mask, per_model, weighted_sum
from soups.merging.operands import Operands
from soups.merging.selection import Map
from soups.merging.transforms import Keep, KeepNorm, Transform, WholeModelTransform, choices_of


@dataclass(frozen=True)
class Elect:
    """Sign election (TIES, section 4, step 2): the sum decides an element's sign; task vectors of another sign are left out.

    Attributes:
        weighted: whether the sum is weighted by the models' weights.
        zero: the sign for a sum of zero: plus; none, so that all task vectors are left out; or the majority sign of the whole
            model, as in the paper's code (minus if that majority is zero too).
    """

    weighted: bool = False
    zero: Literal["plus", "none", "majority"] = "none"


Reduce = Literal["sum", "mean", "count"]


class Seen(NamedTuple):
    """The result of observing a tensor or the whole model.

    Attributes:
        states: the transform's state for each model.
        majority: the sign for sums of zero.
        held: the task vectors, shape (models, n), if they fit in memory.
        transformed: whether `held` is already transformed.
    """

    states: Sequence[Any]
    majority: float = 1.0
    held: Tensor | None = None
    transformed: bool = True


@dataclass(frozen=True)
class TaskVectors(WholeModelMethod):
    """θ_0 + λ · reduce(consensus(transform(τ_t))).

    Attributes:
        transform: the transform of each task vector.
        weight: one weight for all models, or one for each.
        consensus: sign election, or `None`.
        reduce: "sum": the weighted sum. "mean": that sum divided by the agreeing models' total weight. "count": that sum divided
            by the number of agreeing models. An element that is zero does not agree.
        scale: λ.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    loops: ClassVar[bool] = True
    transform: Transform = field(default_factory=Keep)
    weight: PerModel = 1.0
    consensus: Elect | None = None
    reduce: Reduce = "sum"
    scale: float = 1.0

    @property
    def unit(self) -> Unit:
        """The unit that the transform needs whole."""
        return self.transform.unit

    @property
    def scope(self) -> Scope:
        """The transform's scope, or "model" if the whole model decides the sign for sums of zero."""
        majority = self.consensus is not None and self.consensus.zero == "majority"
        return "model" if majority else self.transform.scope

    def observe(self, operands: Operands) -> Seen:
        """Observe each model's tensor, and transform it at once if it can be held in memory."""
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
        """Observe each model, then the majority sign if the consensus needs it."""
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
        """Return the transformed task vectors (weighted if `weighted`) and the sum that decides the sign."""
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
        """Return the transform's choice for each model's chunk, if one compiled loop can compute the merge."""
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
    weight: PerModel,
    scale: float,
    normalize: bool,
    rescale: bool,
    elect: bool,
) -> TaskVectors:
    """Return mergekit's form of a task-arithmetic method with this transform.

    Args:
        transform: the transform of each task vector.
        weight: one weight for all models, or one for each; the weights count in the sign election.
        scale: mergekit's `lambda`.
        normalize: divide by the sum of the weights; with an election, by the weights of the agreeing models.
        rescale: restore each task vector's L1 norm, tensor by tensor.
        elect: elect signs, with plus for a sum of zero.
    """
    return TaskVectors(
        KeepNorm(transform) if rescale else transform,
        weight,
        Elect(weighted=True, zero="plus") if elect else None,
        "mean" if normalize else "sum",
        scale,
    )
