"""Transforms: changes to one task vector at a time, the first stage of a merge (`soups.merging.stages`).

Each transform states its scope. A transform whose result depends on a whole tensor or model looks at it in a pass of its own,
before anything is merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from soups.merging import kernels
from soups.merging.chunk import Chunk, Unit
from soups.merging.kernels import Choice, absolute
from soups.merging.method import PerModel, Scope, one_of
from soups.merging.noise import masked_
from soups.merging.operands import HeldOperands, Operands
from soups.merging.selection import Cut, Map, Stream, cut_at, exact_cut, held_cut, tensor_cut
from soups.merging.sums import BlockSum


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
        least: keep at least so many of what a density above zero is a share of.
        extra: keep this many more (the paper's code keeps int(density · n) + 1).
    """

    density: PerModel
    within: Literal["model", "tensor"] = "model"
    exact: bool = False
    least: int = 1
    extra: int = 0

    @property
    def scope(self) -> Scope:
        """The whole model or the tensor."""
        return self.within

    def _rank(self, model: int, total: int) -> int:
        density = one_of(self.density, model, share="density")
        return total if density == 1 else max(self.least if density > 0 else 0, int(density * total)) + self.extra

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
