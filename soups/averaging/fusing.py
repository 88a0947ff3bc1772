"""One compiled kernel that moves several averages towards the weights.

An elementwise operation of torch moves three numbers of four bytes for each average that it updates, the weights among them,
and runs at what that operation's own loop can do. A loop that reads a weight once and updates K averages moves (1 + 2K)/3 of
the bytes of one. What that saves, and what a call costs small tensors, is measured by `python -m benchmarks.averaging`.

The kernel computes a + w (θ - a), each operation rounded: its result does not depend on K, on how tensors are cut, or on the
number of threads. torch's `lerp_` fuses the multiplication into the addition, so that the two differ in the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soups.errors import ConfigError

Kernel = Callable[[Tensor, list[Tensor], list[Tensor]], None]


@functools.cache
def _kernel(count: int) -> Kernel:
    """Return the kernel for `count` averages; torch compiles it for a dtype and device at its first call."""

    def lerp(theta: Tensor, averages: list[Tensor], weights: list[Tensor]) -> None:
        for average, weight in zip(averages, weights, strict=True):
            average.add_((theta - average) * weight)

    lerp.__name__ = f"lerp_{count}"
    return torch.compile(lerp, dynamic=True)


def lerp_together(theta: Sequence[Tensor], averages: Sequence[tuple[Sequence[Tensor], Tensor]]) -> None:
    """Move averages towards the weights in place: a ← a + w (θ - a).

    Args:
        theta: the weights.
        averages: for each average its tensors, of the shapes, dtype and device of the weights, and its w, without
            dimensions and in that dtype.

    Raises:
        ConfigError: there is nothing to compile with.
    """
    steps = [weight for _, weight in averages]
    kernel = _kernel(len(averages))
    for number, weight in enumerate(theta):
        tensors = [weight, *(kept[number] for kept, _ in averages)]
        flat = tensors if weight.dim() == 1 else [flat_view(tensor) for tensor in tensors]
        if any(tensor is None for tensor in flat):
            for tensor, step in zip(tensors[1:], steps, strict=True):
                tensor.add_((weight - tensor) * step)
            continue
        try:
            kernel(flat[0], flat[1:], steps)  # type: ignore[arg-type]
        except RuntimeError as error:
            # Imported here because it takes a second, and anybody who gets here has it already.
            from torch._dynamo.exc import BackendCompilerFailed  # pyright: ignore[reportPrivateImportUsage]

            if not isinstance(error, BackendCompilerFailed):
                raise
            raise ConfigError(
                f"fused=True compiles a kernel, and that failed: {str(error).strip().splitlines()[0]} It needs a C++ "
                f"compiler (g++ or clang, or the one that CXX names). Leave fused out for the same average without one."
            ) from error


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return a one-dimensional view of a dense tensor in the order of its memory, or None if it is not dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return None
