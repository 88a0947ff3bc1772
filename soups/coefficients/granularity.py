"""How many coefficients a mixture has: one a model, a group of tensors, a tensor, a column or an element."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

from soups.errors import ConfigError, did_you_mean
from soups.stores.store import TensorMeta

Granularity = Literal["model", "group", "tensor", "column", "element"]
GRANULARITIES = ("model", "group", "tensor", "column", "element")


@dataclass(frozen=True)
class CoefficientBlock:
    """The rows of a coefficient matrix that belong to one tensor.

    Attributes:
        start: the first row.
        shape: of the coefficients as they are multiplied with the tensor: `()`, `(columns,)` or the tensor's shape.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of rows."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def of(self, coefficients: Tensor, vector: int) -> Tensor:
        """Return one vector's coefficients for the tensor, shaped to be multiplied with it."""
        return coefficients[self.start : self.start + self.count, vector].reshape(self.shape)


@dataclass(frozen=True)
class CoefficientRows:
    """Which rows of the coefficient matrix belong to which tensor.

    Attributes:
        blocks: by tensor name.
        names: one a row for "model", "group" and "tensor"; one a tensor for "column" and "element".
        count: rows in all.
    """

    blocks: dict[str, CoefficientBlock]
    names: list[str]
    count: int


def assign_rows(
    tensors: Mapping[str, TensorMeta], granularity: str, groups: str | Sequence[str] | None = None
) -> CoefficientRows:
    """Assign each tensor its rows.

    Args:
        tensors: shape and dtype by name, in order.
        granularity: "model", "group", "tensor", "column" (one coefficient a position of the last axis; one for a tensor
            of a single axis) or "element".
        groups: for "group": a regular expression, where tensors with the same matched text share a row (the text of the
            first group of parentheses, if it has one), or patterns of names (`fnmatch`), one row each, the first that
            matches. Tensors that nothing matches share the row "*".

    Raises:
        ConfigError: an unknown granularity, `groups` where it is not used or missing where it is, or a pattern that
            matches no tensor.

    >>> import torch
    >>> found = assign_rows({f"layer.{i}.w": TensorMeta((2, 3), torch.float32) for i in (0, 0, 1)}, "group", r"layer\\.\\d+")
    >>> found.names, found.blocks["layer.1.w"].start
    (['layer.0', 'layer.1'], 1)
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"There is no granularity {granularity!r}: {did_you_mean(granularity, GRANULARITIES)}")
    if (groups is not None) != (granularity == "group"):
        raise ConfigError(
            f"granularity={granularity!r} with groups={groups!r}: `groups` belongs to granularity='group', which needs it."
        )
    if granularity == "model":
        return CoefficientRows({name: CoefficientBlock(0, ()) for name in tensors}, ["model"], 1)
    if granularity == "tensor":
        return CoefficientRows(
            {name: CoefficientBlock(row, ()) for row, name in enumerate(tensors)}, list(tensors), len(tensors)
        )
    if granularity == "group":
        assert groups is not None
        labels = {name: _label(name, groups) for name in tensors}
        names = list(dict.fromkeys(labels.values()))
        _check_groups(groups, names)
        return CoefficientRows(
            {name: CoefficientBlock(names.index(label), ()) for name, label in labels.items()}, names, len(names)
        )
    blocks: dict[str, CoefficientBlock] = {}
    count = 0
    for name, meta in tensors.items():
        shape = meta.shape if granularity == "element" else meta.shape[-1:] if len(meta.shape) > 1 else ()
        blocks[name] = CoefficientBlock(count, shape)
        count += blocks[name].count
    return CoefficientRows(blocks, list(tensors), count)


def _label(name: str, groups: str | Sequence[str]) -> str:
    if isinstance(groups, str):
        found = re.search(groups, name)
        return "*" if found is None else str(found.group(1) if found.re.groups else found.group(0))
    return next((pattern for pattern in groups if fnmatchcase(name, pattern)), "*")


def _check_groups(groups: str | Sequence[str], names: Sequence[str]) -> None:
    unused = [groups] if isinstance(groups, str) and set(names) == {"*"} else []
    if not isinstance(groups, str):
        unused = [pattern for pattern in groups if pattern not in names]
    if unused:
        raise ConfigError(f"groups: {unused[0]!r} matches no tensor, or only after an earlier pattern.")
