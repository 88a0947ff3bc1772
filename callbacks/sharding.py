"""Sharded models: averages are kept shard by shard and gathered only when one file is written.

FSDP2 and tensor parallelism hold parameters as DTensors, whose local shard the optimizer updates in place; the average of
the shards is the shard of the average, so nothing is communicated.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from soups.errors import ConfigError


def refuse_opaque(trainer: pl.Trainer) -> None:
    """Stop before training where parameters are not what they seem.

    Raises:
        ConfigError: FSDP1, whose flat parameters mix layers and are gone between steps, or DeepSpeed, whose 16-bit
            parameters are copies of partitions that only its optimizer holds.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ConfigError(
            "FSDPStrategy keeps flattened parameters that change shape between steps, so no average can be kept of them. "
            "Use ModelParallelStrategy with torch's fully_shard in configure_model(): it is averaged shard by shard."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            "DeepSpeed keeps the float32 weights inside its optimizer, where callbacks cannot see them, and an average of "
            "its 16-bit copies would stand still. Use DDP, or ModelParallelStrategy with torch's fully_shard."
        )


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """Return this process's shard of a DTensor (the memory itself), or the tensor."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def like(shard: Tensor, tensor: Any) -> Tensor:
    """Return `shard` as a DTensor placed like `tensor`; unchanged where that is not one."""
    if not is_sharded(tensor):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def gather(shard: Tensor, tensor: Any) -> Tensor:
    """Return the whole tensor on the CPU, of which `shard` is this process's part. Every process must call this."""
    whole: Any = like(shard, tensor)
    return whole.full_tensor().cpu() if is_sharded(whole) else shard


def shard_of(whole: Tensor, tensor: Any) -> Tensor:
    """Return this process's part of `whole`, cut as `tensor` is. Nothing is communicated."""
    if not is_sharded(tensor):
        return whole
    if whole.shape == local(tensor).shape and whole.shape != tensor.shape:
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]


def reshard(module: torch.nn.Module) -> None:
    """Let go of gathered parameters, so that the next forward pass gathers the shards as they are now."""
    for layer in module.modules():
        if hasattr(layer, "reshard") and hasattr(layer, "unshard"):
            layer.reshard()  # type: ignore[operator]


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether any of the tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors.values())
