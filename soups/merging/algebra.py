"""Task-vector algebra for people: `base + 0.7 * (a - base) - 0.3 * (b - base)`, written as it is read.

Editing models with task arithmetic (arXiv:2212.04089), section 2: adding a task vector learns, subtracting one forgets, and
`b + (c − a)` carries an analogy over. Nothing is read until `save` or `load`; then each tensor is visited once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from soups.errors import ConfigError
from soups.merging.api import merge
from soups.merging.chunk import Chunk
from soups.merging.method import Method
from soups.merging.methods.linear import reduced
from soups.stores import Checkpoint


@dataclass(frozen=True)
class Combination(Method):
    """θ = Σ w_i θ_i, with factors by tensor name: the weight of model i in a tensor is the sum of its terms there.

    Attributes:
        terms: for each model, (pattern, factor) pairs; of one model's terms, all that match a tensor count.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    terms: tuple[tuple[tuple[str, float], ...], ...] = ()

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the weighted sum."""
        weights = [sum(factor for pattern, factor in own if fnmatchcase(chunk.key, pattern)) for own in self.terms]
        return reduced(weights, chunk)


@dataclass(frozen=True)
class Expression:
    """A sum of models with factors. Make one by `weights(place)`; combine with `+`, `-`, `*`, `/`; then `save` or `load`.

    >>> import torch
    >>> base, a, b = (weights({"w": torch.tensor([x])}) for x in (1.0, 3.0, 10.0))
    >>> (base + 0.5 * (a - base) - (b - base)).load()["w"]
    tensor([-7.])
    """

    places: tuple[Checkpoint, ...]
    terms: tuple[tuple[tuple[str, float], ...], ...] = field(default=())

    def __add__(self, other: Expression) -> Expression:
        places, terms = list(self.places), [list(own) for own in self.terms]
        for place, own in zip(other.places, other.terms, strict=True):
            index = next((i for i, known in enumerate(places) if _same(known, place)), None)
            if index is None:
                places.append(place)
                terms.append(list(own))
            else:
                terms[index] += own
        return Expression(tuple(places), tuple(tuple(own) for own in terms))

    def __mul__(self, factor: float) -> Expression:
        return self._mapped(lambda pattern, old: (pattern, old * factor))

    def __neg__(self) -> Expression:
        return self * -1.0

    def __sub__(self, other: Expression) -> Expression:
        return self + -other

    def __truediv__(self, divisor: float) -> Expression:
        return self * (1.0 / divisor)

    __rmul__ = __mul__

    def _mapped(self, change: Any) -> Expression:
        return Expression(self.places, tuple(tuple(change(*term) for term in own) for own in self.terms))

    def on(self, pattern: str) -> Expression:
        """Keep this part of a sum to tensors whose names match a pattern: `base + (a - base).on("layers.1*")`.

        Raises:
            ConfigError: it is kept to a pattern already.
        """
        if any(old != "*" for own in self.terms for old, _ in own):
            raise ConfigError("This expression is kept to some tensors already; add its parts up instead.")
        return self._mapped(lambda _, factor: (pattern, factor))

    def load(self, **options: Any) -> dict[str, Tensor]:
        """Return the weights; options are those of `soups.merging.merge`."""
        return cast("dict[str, Tensor]", merge(Combination(self.terms), self.places, **options))

    def save(self, out: str | os.PathLike[str], **options: Any) -> Path:
        """Write the weights; options are those of `soups.merging.merge`."""
        return cast("Path", merge(Combination(self.terms), self.places, out=out, **options))


def weights(place: Checkpoint) -> Expression:
    """Return a model as a term: whatever `open_store` takes."""
    return Expression((place,), ((("*", 1.0),),))


def _same(left: Checkpoint, right: Checkpoint) -> bool:
    if isinstance(left, str | os.PathLike) and isinstance(right, str | os.PathLike):
        return os.fspath(left) == os.fspath(right)
    return left is right


def task_vector(expert: Checkpoint, base: Checkpoint) -> Expression:
    """Return expert − base.

    >>> import torch
    >>> base, expert = {"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}
    >>> (weights(base) - task_vector(expert, base)).load()["w"]
    tensor([-2.])
    """
    return weights(expert) - weights(base)
