"""Batches of any size as groups of a fixed number of examples, so that no result depends on the batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from soups.errors import DataError

Batch = Any
"""A tensor, or dicts, lists and tuples of tensors, whose first axis is the examples."""


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of the same form with each tensor changed; other values stay."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in cast("Mapping[Any, Any]", batch).items()}
    if isinstance(batch, list | tuple):
        return [map_tensors(value, change) for value in cast("Sequence[Any]", batch)]
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch in order."""
    found: list[Tensor] = []
    map_tensors(batch, lambda tensor: (found.append(tensor), tensor)[1])
    return found


def examples_of(batch: Batch) -> int:
    """Return how many examples a batch has.

    Raises:
        DataError: it holds no tensor with an axis of examples, or tensors that disagree.
    """
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim}
    if len(sizes) != 1:
        what = f"tensors of {sorted(sizes)} examples" if sizes else f"no tensors (a {type(batch).__name__})"
        raise DataError(
            f"A batch holds {what}. Statistics need tensors, or dicts and lists of tensors, whose first axis is the examples."
        )
    return sizes.pop()


def regrouped(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the examples of some batches, in order, in groups of `size`; the last may be smaller.

    Texts are padded to the longest of a group, whatever they were padded to in their batch: columns that an `attention_mask`
    leaves out for all are cut from the right, and shorter examples get zeros there.
    """
    waiting: list[Batch] = []
    for batch in batches:
        for number in range(examples_of(batch)):
            waiting.append(
                _cropped(map_tensors(batch, lambda one, n=number: one[n : n + 1] if one.ndim else one.reshape(1)))
            )
            if len(waiting) == size:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _cropped(example: Batch) -> Batch:
    mask: Any = cast("Mapping[str, Any]", example).get("attention_mask") if isinstance(example, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask.any()):
        return example
    length, kept = mask.shape[1], int(mask[0].nonzero().max()) + 1
    return map_tensors(example, lambda one: one[:, :kept] if one.ndim > 1 and one.shape[1] == length else one)


def _joined(examples: Sequence[Batch]) -> Batch:
    """Return examples of one form as one batch."""
    columns = [tensors_of(example) for example in examples]
    if len({len(column) for column in columns}) != 1:
        raise DataError("The batches hold different numbers of tensors, so their examples cannot be put together.")
    joined = iter([_cat(list(row)) for row in zip(*columns, strict=True)])
    return map_tensors(examples[0], lambda _: next(joined))


def _cat(tensors: list[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [
            functional.pad(one, [0, 0] * (one.ndim - 2) + [0, longest - one.shape[1]]) if one.ndim > 1 else one
            for one in tensors
        ]
    return torch.cat(tensors)


def digest_of(group: Batch, running: Any = None) -> Any:
    """Return a running SHA-256 with the tensors of a group added."""
    running = running or hashlib.sha256()
    for tensor in tensors_of(group):
        plain = tensor.detach().cpu().contiguous()
        running.update(f"{plain.dtype}|{tuple(plain.shape)}|".encode())
        running.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return running
