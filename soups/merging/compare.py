"""Where and how much two checkpoints differ, streamed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from soups.errors import ConfigError, install
from soups.merging.operands import Operands, Source
from soups.merging.sums import BlockSum
from soups.stores.opening import Checkpoint, open_store
from soups.stores.store import headers
from soups.weights import describe_mismatch


class TensorDifference(NamedTuple):
    """How two tensors (or groups of them) differ.

    Attributes:
        distance: |a − b|, Euclidean.
        first: |a|.
        second: |b|.
        inner: ⟨a, b⟩.
        largest: the largest |a_i − b_i|.
    """

    distance: float
    first: float
    second: float
    inner: float
    largest: float

    @property
    def relative(self) -> float:
        """|a − b| / |a|; infinity where a is zero and b is not."""
        return self.distance / self.first if self.first else math.inf if self.distance else 0.0

    @property
    def cosine(self) -> float:
        """The cosine between both; 1 where both are zero."""
        product = self.first * self.second
        return self.inner / product if product else float(self.distance == 0)


def compare(first: Checkpoint, second: Checkpoint) -> tuple[dict[str, TensorDifference], str]:
    """Compare two checkpoints tensor by tensor, in little memory.

    Returns:
        The differences of the tensors that both have in one shape, by name; and what cannot be compared, as a sentence.
    """
    with open_store(first) as left, open_store(second) as right:
        ours, theirs = headers(left), headers(right)
        mismatch = describe_mismatch(ours, theirs)
        tied = left.tied()
        result: dict[str, TensorDifference] = {}
        for key, tensor in ours.items():
            if key in theirs and key not in tied and theirs[key].shape == tensor.shape and not tensor.is_complex():
                result[key] = _difference(
                    Operands(key, tuple(tensor.shape), [Source(left, key), Source(right, key)], None)
                )
        return result, mismatch


def _difference(operands: Operands) -> TensorDifference:
    sums = [BlockSum() for _ in range(4)]
    largest = 0.0
    for chunk in operands:
        a, b = chunk.models
        delta = a - b
        for total, values in zip(sums, (delta * delta, a * a, b * b, a * b), strict=True):
            total.add(values)
        peak = float(delta.abs_().max())
        largest = peak if math.isnan(peak) else max(largest, peak)
    distance, one, two, inner = (total.value() for total in sums)
    return TensorDifference(math.sqrt(distance), math.sqrt(one), math.sqrt(two), inner, largest)


def gather(differences: Mapping[str, TensorDifference], group: Callable[[str], str]) -> dict[str, TensorDifference]:
    """Combine tensors into groups, layers for example.

    >>> gather({"a.w": TensorDifference(3, 1, 1, 1, 3), "a.b": TensorDifference(4, 0, 0, 0, 4)}, lambda name: name[0])["a"].distance
    5.0
    """
    result: dict[str, TensorDifference] = {}
    for name, row in differences.items():
        old = result.get(group(name), TensorDifference(0, 0, 0, 0, 0))
        result[group(name)] = TensorDifference(
            math.hypot(old.distance, row.distance),
            math.hypot(old.first, row.first),
            math.hypot(old.second, row.second),
            old.inner + row.inner,
            max(old.largest, row.largest),
        )
    return result


def heatmap(differences: Mapping[str, TensorDifference], path: str | os.PathLike[str]) -> Path:
    """Save a figure of relative differences: a row for each kind of tensor, a column for each layer.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"The figure needs matplotlib: {install('train')}.") from error
    from soups.merging.mergekit.layers import Layers

    layers = Layers(differences)
    cells: dict[tuple[str, int], float] = {}
    for name, row in differences.items():
        place = layers.place(name)
        stack = place.stack or ""
        cells[f"{stack}*.{place.rest}" if place.stack is not None else name, max(0, place.layer)] = row.relative
    names = list(dict.fromkeys(name for name, _ in cells))
    columns = max(column for _, column in cells) + 1 if cells else 1
    floor = 1e-8
    grid = [
        [math.log10(max(floor, cells.get((name, column), math.nan))) for column in range(columns)] for name in names
    ]
    figure = Figure(figsize=(3 + 0.35 * columns, 1.2 + 0.22 * max(1, len(names))), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid or [[0.0]], aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="log10 |a − b| / |a|")
    target = Path(path)
    figure.savefig(target, dpi=150)
    return target
