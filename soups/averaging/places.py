"""Find the tensors of a module in a state dict whatever their keys are: by their memory, else by name and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soups.stores.averages import plain_name
from soups.weights import is_averaged


class Places(NamedTuple):
    """What `find_places` found.

    Attributes:
        names: key of the state dict to the module's name of that tensor; tied keys share a name.
        unknown: keys of floating tensors that are no tensor of the module.
    """

    names: dict[str, str]
    unknown: list[str]


def find_places(state: Mapping[str, Any], tensors: Mapping[str, Tensor], *, by_name: bool = False) -> Places:
    """Learn which tensor of a module each entry of a state dict is.

    An entry that shares memory with a tensor of the module is that tensor, under any key. A copy (on another device, in
    another dtype) is the tensor of its name if the values agree, else the one tensor of its shape and values, names deciding
    between equals by their longest common ending.

    Args:
        state: a state dict, perhaps changed by a hook.
        tensors: the module's tensors by plain name, first names of tied ones only.
        by_name: go by names and shapes alone; for sharded tensors, whose values lie on several processes.
    """
    memory = {_memory(tensor): name for name, tensor in tensors.items() if tensor.numel()}
    names: dict[str, str] = {}
    unknown: list[str] = []
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        plain = plain_name(key)
        if by_name:
            found = plain if plain in tensors else None
        else:
            found = memory.get(_memory(value)) if value.numel() else None
            found = found or _by_value(plain, value, tensors)
        if found is not None:
            names[key] = found
        elif is_averaged(value):
            unknown.append(key)
    return Places(names, unknown)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _by_value(key: str, value: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    if key in tensors and _agree(tensors[key], value):
        return key
    equal = [name for name, tensor in tensors.items() if tensor.shape == value.shape and _agree(tensor, value)]
    if not equal:
        return None
    ranked = sorted(((_common_ending(name, key), name) for name in equal), reverse=True)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        return None
    return ranked[0][1]


def _agree(tensor: Tensor, value: Tensor) -> bool:
    if tensor.shape != value.shape or value.device.type == "meta":
        return False
    if tensor.is_complex() != value.is_complex():
        return False
    with torch.no_grad():
        cast = tensor.detach().to(device=value.device, dtype=value.dtype)
        return torch.equal(cast, value) or bool(((cast == value) | ((cast != cast) & (value != value))).all())


def _common_ending(one: str, other: str) -> int:
    """Return how many dotted parts two names share at their ends.

    >>> _common_ending("net.0.weight", "model.0.weight")
    2
    """
    count = 0
    for left, right in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if left != right:
            break
        count += 1
    return count
