"""How each kind of Python object is read, written and compared by `ObjectState`."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Tensors and arrays above this many bytes are not copied.
LARGE = 1 << 28
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.generic, range)
_OPAQUE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)
# Packages whose objects are machinery: threads, loggers, loops, compilers. The exceptions carry state of the user's.
_MACHINERY = (
    "torch", "threading", "_thread", "multiprocessing", "concurrent", "asyncio", "queue", "logging", "weakref", "functools",
    "io", "_io", "socket", "contextlib", "rich", "tqdm", "wandb", "tensorboard", "fsspec", "lightning", "pytorch_lightning",
    "lightning_fabric", "soups.callbacks", "soups.averaging",
)  # fmt: skip
_STATEFUL = (
    "torch.nn", "torch.optim", "torch.utils.data", "lightning.pytorch.core", "lightning.pytorch.callbacks",
    "lightning.pytorch.utilities", "pytorch_lightning.core", "pytorch_lightning.callbacks", "pytorch_lightning.utilities",
)  # fmt: skip
_EXCEPT = (
    "lightning.pytorch.callbacks.progress",
    "pytorch_lightning.callbacks.progress",
    "torch.utils.data.dataloader._",
)

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "<absent>"})()


class Kind(NamedTuple):
    """How a kind of object is read, written and compared; `keyed` if its content is a mapping of slots."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    same: Callable[[Any, Any], bool]
    keyed: bool = False


def same_value(one: Any, other: Any) -> bool:
    """Tell whether two slot values are the same object, or equal plain values (NaN equals NaN)."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, (*_ATOMS, tuple)):
        return False
    if isinstance(one, tuple):
        return _same_items(one, other)
    return bool(one == other) or bool(one != one and other != other)


def _same_items(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(same_value, one, other))


def _write_list(target: Any, content: Any) -> None:
    target.clear()
    target.extend(content)


def _write_set(target: Any, content: Any) -> None:
    target.clear()
    target.update(content)


def _read_tensor(tensor: Tensor) -> Tensor | None:
    if nn.parameter.is_lazy(tensor):
        return None
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.nbytes > LARGE:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _write_tensor(tensor: Tensor, content: Tensor | None) -> None:
    if content is None:
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != content.shape or tensor.dtype != content.dtype:
            tensor.data = content.clone()
        else:
            tensor.copy_(content)


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _read_array(array: Any) -> Any:
    return None if array.nbytes > LARGE or array.dtype.hasobject else array.copy()


def _write_array(array: Any, content: Any) -> None:
    if content is not None and array.flags.writeable and array.shape == content.shape:
        array[...] = content


def _same_array(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def write_keys(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Write values under their keys into a dictionary; `ABSENT` removes a key."""
    # A class of the user's may override these methods; OrderedDict keeps its order in them.
    base: Any = OrderedDict if isinstance(target, OrderedDict) else dict
    for key, value in content.items():
        if value is ABSENT:
            base.pop(target, key, None)
        else:
            base.__setitem__(target, key, value)


def _slot_names(item: Any) -> list[str]:
    names = [getattr(kind, "__slots__", ()) for kind in type(item).__mro__]
    flat = [name for part in names for name in ((part,) if isinstance(part, str) else part)]
    return [name for name in flat if not name.startswith("__") and hasattr(item, name)]


def _write_slots(item: Any, content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if value is not ABSENT:
            object.__setattr__(item, key, value)


DICT = Kind(lambda item: dict(dict.items(item)), write_keys, same_value, keyed=True)
ATTRIBUTES = Kind(lambda item: dict(vars(item)), lambda item, new: write_keys(vars(item), new), same_value, keyed=True)
SLOTS = Kind(
    lambda item: {name: getattr(item, name) for name in _slot_names(item)}, _write_slots, same_value, keyed=True
)
LIST = Kind(list, _write_list, _same_items)
_SET = Kind(set, _write_set, lambda one, other: one == other)
TENSOR = Kind(_read_tensor, _write_tensor, _same_tensor)
ARRAY = Kind(_read_array, _write_array, _same_array)
_TORCH_GENERATOR = Kind(lambda item: item.get_state(), lambda item, new: item.set_state(new), _same_tensor)
_NUMPY_GENERATOR = Kind(
    lambda item: copy.deepcopy(item.bit_generator.state),
    lambda item, new: setattr(item.bit_generator, "state", new),
    lambda one, other: repr(one) == repr(other),
)
_NUMPY_STATE = Kind(
    lambda item: item.get_state(legacy=True),
    lambda item, new: item.set_state(new),
    lambda one, other: one[2:] == other[2:] and bool((one[1] == other[1]).all()),
)
_RANDOM = Kind(lambda item: item.getstate(), lambda item, new: item.setstate(new), lambda one, other: one == other)


EMPTY: dict[type, Kind] = {dict: DICT, OrderedDict: DICT, list: LIST, set: _SET}
FILE = Kind(lambda item: item.tell(), lambda item, new: item.seek(new), lambda one, other: one == other)


@functools.cache
def kind_of(type_: type) -> Kind | None:
    """Return how objects of a type are recorded, or None if they have no content beside their attributes."""
    if issubclass(type_, Tensor):
        return TENSOR
    for types, kind in (
        (list, LIST), (deque, LIST), (set, _SET), (dict, DICT), (np.ndarray, ARRAY), (torch.Generator, _TORCH_GENERATOR),
        (np.random.Generator, _NUMPY_GENERATOR), (np.random.RandomState, _NUMPY_STATE), (random.Random, _RANDOM),
    ):  # fmt: skip
        if issubclass(type_, types):
            return kind
    return None


@functools.cache
def is_atom(type_: type) -> bool:
    """Tell whether objects of a type hold no state, or none that is ours to record."""
    return issubclass(type_, (*_ATOMS, *_OPAQUE, nn.Parameter))


@functools.cache
def is_machinery(type_: type) -> bool:
    """Tell whether objects of a type are threads, loggers, loops or compilers, whose attributes are not walked."""
    home = f"{type_.__module__}.{type_.__qualname__}"
    if home.startswith(_EXCEPT):
        return True
    named = any(home.startswith(f"{package}.") for package in _MACHINERY)
    return named and not home.startswith(_STATEFUL) and not issubclass(type_, nn.Module)
