"""BatchNorm statistics for averaged weights.

The running statistics of a network belong to its weights; an average of weights needs statistics of its own
(arXiv:1803.05407, section 3.2). They are measured by forward passes in which the BatchNorm layers, and only they, are in
training mode: dropout would shift the variances.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from soups.errors import DataError


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


@contextlib.contextmanager
def measuring(module: nn.Module) -> Generator[None]:
    """Within the block, BatchNorm layers collect the plain mean of their batches' statistics; nothing else trains.

    Statistics start anew. Modes and momenta are put back at the end; the collected statistics stay.
    """
    modes = {layer: layer.training for layer in module.modules()}
    layers = batch_norms(module)
    momenta = {name: layer.momentum for name, layer in layers.items()}
    module.eval()
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # cumulative: every batch counts the same
        layer.train()
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
        for layer, mode in modes.items():
            layer.training = mode


@torch.no_grad()
def reestimate(module: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> None:
    """Measure BatchNorm statistics anew for the weights that `module` has now.

    Equal to `torch.optim.swa_utils.update_bn` for networks without dropout, with the call to the model in your hands.

    Args:
        module: its BatchNorm layers' running statistics are overwritten.
        batches: training batches; a hundred or so are enough.
        forward: what to do with a batch; `module(batch)`, or `module(batch[0])` for a pair, when None.

    Raises:
        DataError: there were no batches.
    """
    if not batch_norms(module):
        return
    call = forward or (lambda batch: module(batch[0] if isinstance(batch, list | tuple) else batch))  # pyright: ignore[reportUnknownVariableType]
    seen = 0
    before = statistics(module)
    with measuring(module):
        for batch in batches:
            call(batch)
            seen += 1
    if not seen:
        restore(module, before)
        raise DataError("There were no batches to measure BatchNorm statistics with. Give at least one training batch.")


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running statistics of all BatchNorm layers, by state-dict name."""
    result: dict[str, Tensor] = {}
    for name, layer in batch_norms(module).items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            tensor = getattr(layer, key)
            if tensor is not None:
                result[f"{name}.{key}" if name else key] = tensor.detach().clone()
    return result


def restore(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Write back what `statistics` returned."""
    for name, layer in batch_norms(module).items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            tensor = saved.get(f"{name}.{key}" if name else key)
            if tensor is not None:
                getattr(layer, key).copy_(tensor)
