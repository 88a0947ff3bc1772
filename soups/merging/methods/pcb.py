"""PCB: parameters compete within a task and across tasks, and the losers are dropped.

Parameter competition balancing (arXiv:2410.02396), section 3. With |τ_t| clipped at its quantiles c and 1 − c over the
whole model and mm() the scaling of the result to 0 … 1:

    intra_t = exp(T · mm(|τ_t|)²),   inter_t = Σ_s tanh(τ̃_t τ̃_s),  τ̃ = sgn(τ) mm(|τ|),   score_t = intra_t · inter_t
    θ = θ_0 + λ Σ w_t τ_t / Σ w_t,   w_t = (score_t above its (1 − r)-quantile) scaled to 0 … 1

This is the form of the authors' vision code; their language code takes tanh(τ_t Σ τ_s), which changes when all models are
scaled.

When it fails: Scores are made from the whole model four times, and the survivors' share suits tasks of like size. Task
vectors that differ in norm should be brought to one norm first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from soups.merging.chunk import Chunk
from soups.merging.method import Scope, WholeModelMethod
from soups.merging.operands import Operands
from soups.merging.selection import Map, Stream, kth_largest
from soups.merging.transforms import magnitudes


class Range(NamedTuple):
    """Two quantiles of a stream."""

    low: float
    high: float

    def unit(self, values: Tensor) -> Tensor:
        """Clip to the range and scale to 0 … 1."""
        width = self.high - self.low
        return values.clamp(self.low, self.high).sub_(self.low).div_(width if width > 0 else 1.0)


@dataclass(frozen=True)
class PCB(WholeModelMethod):
    """Competition within and across tasks.

    Attributes:
        ratio: r, the share of each task vector that survives.
        clip: c, the share of magnitudes to clip at either end.
        scale: λ, the factor of the merged task vector.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    ratio: float = 0.05
    clip: float = 0.01
    scale: float = 1.0

    @property
    def scope(self) -> Scope:
        """Quantiles are of the whole model."""
        return "model"

    def observe_all(self, operands: Sequence[Operands], map: Map) -> tuple[list[Range], list[Range]]:
        """Find the quantiles of the magnitudes, then those of the scores."""
        total = sum(one.numel for one in operands)
        dtype = torch.float64 if any(one.dtype == torch.float64 for one in operands) else torch.float32
        # The authors' order statistics: ascending places int(n · c), int(n · (1 − c) − 1) and int(n · (1 − r)).
        low, high = int(total * self.clip), int(total * (1 - self.clip) - 1)
        clips: list[Range] = []
        for model in range(len(operands[0].models)):
            streams = [_wide(magnitudes(one.only(model)), dtype) for one in operands]
            clips.append(Range(*kth_largest(streams, [total - low, total - high], dtype=dtype, map=map)))
        scores: list[Range] = []
        for model in range(len(clips)):
            streams = [_wide(self._score_stream(one, clips, model, 1), dtype) for one in operands]
            rank = max(1, total - int(total * (1 - self.ratio)))
            high, least = kth_largest(streams, [1, rank], dtype=dtype, map=map)
            if least == 0:  # among the negative ones, whose magnitudes are in the other order
                streams = [_wide(self._score_stream(one, clips, model, -1), dtype) for one in operands]
                least = -kth_largest(streams, [total - rank + 1], dtype=dtype, map=map)[0]
            scores.append(Range(least, high))
        return clips, scores

    def _score_stream(self, operands: Operands, clips: list[Range], model: int, sign: int) -> Stream:
        """Return the stream of positive scores, or of the magnitudes of negative ones; zero in the place of the others."""
        return lambda: (_scores(chunk.deltas(), clips)[model].mul_(sign).clamp_(min=0).abs_() for chunk in operands)

    def combine(self, chunk: Chunk, seen: tuple[list[Range], list[Range]]) -> Tensor:
        """Return the merged chunk."""
        assert chunk.base is not None
        clips, limits = seen
        deltas = chunk.deltas()
        total, divisor = torch.zeros_like(chunk.base), torch.zeros_like(chunk.base)
        for delta, score, clip, limit in zip(deltas, _scores(deltas, clips), clips, limits, strict=True):
            weight = limit.unit(score)
            divisor += weight
            total += delta.abs().clamp_(clip.low, clip.high).mul_(delta.sign()).mul_(weight)
        return total.div_(divisor.clamp_(min=1e-12)).mul_(self.scale).add_(chunk.base)


def _scores(deltas: list[Tensor], clips: list[Range]) -> list[Tensor]:
    units = [clip.unit(delta.abs()) for delta, clip in zip(deltas, clips, strict=True)]
    signed = [unit * delta.sign() for unit, delta in zip(units, deltas, strict=True)]
    result: list[Tensor] = []
    for unit, own in zip(units, signed, strict=True):
        inter = torch.zeros_like(own)
        for other in signed:
            inter += torch.tanh(own * other)
        result.append(torch.exp(unit.square().mul_(len(deltas))).mul_(inter))
    return result


def _wide(stream: Stream, dtype: torch.dtype) -> Stream:
    return lambda: (values.to(dtype) for values in stream())
