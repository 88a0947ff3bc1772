"""How each kind of object is read, written back in place and compared."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import CellType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Tensors and arrays above this many bytes are not copied.
LARGE = 1 << 28
ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.generic, range)

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "<absent>"})()
WHOLE = "<whole>"  # the slot of an object that is compared and written as one

# A place that can change: the object's id and, for attributes and dictionaries, the key.
Slot = tuple[int, Any]


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
    if type(one) is not type(other) or not isinstance(one, (*ATOMS, tuple)):
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


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the plain tensors that a sparse one consists of; a plain tensor is its only part."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _read_tensor(tensor: Tensor) -> Tensor | None:
    if nn.parameter.is_lazy(tensor):
        return None
    if tensor.device.type == "meta" or sum(part.nbytes for part in _parts(tensor)) > LARGE:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _write_tensor(tensor: Tensor, content: Tensor | None) -> None:
    if content is None:
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != content.shape or tensor.dtype != content.dtype or tensor.layout != torch.strided:
            tensor.data = content.clone()
        else:
            tensor.copy_(content)


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype, one.device, one.layout) != (other.shape, other.dtype, other.device, other.layout):
        return False
    if one.layout != torch.strided:
        return all(map(_same_tensor, _parts(one), _parts(other)))
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _read_array(array: Any) -> Any:
    return None if array.nbytes > LARGE else array.copy()


def _write_array(array: Any, content: Any) -> None:
    if content is not None and array.flags.writeable and array.shape == content.shape:
        array[...] = content


def _same_array(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.hasobject:
        return all(map(same_value, one.ravel().tolist(), other.ravel().tolist()))
    return one.tobytes() == other.tobytes()


def write_keys(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Set keys of a dictionary, and take those out that are `ABSENT`."""
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


ELSEWHERE = "elsewhere"


class Held(NamedTuple):
    """A parameter, or a tensor of an optimizer's state, as it was.

    Attributes:
        trained: its `requires_grad`.
        mark: differs where the values differ; None beside a copy, `ELSEWHERE` for values that others take care of.
        values: a copy; None if there is none.
    """

    trained: bool
    mark: Any
    values: Tensor | None


def read_held(tensor: Tensor, *, looked_at: bool, copied: bool) -> Held:
    """Return a parameter's or optimizer's tensor as it is now.

    Args:
        tensor: the tensor.
        looked_at: False for one whose values are taken care of elsewhere.
        copied: whether its values are copied.
    """
    if not looked_at:
        return Held(tensor.requires_grad, ELSEWHERE, None)
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.layout == torch.strided
    if not plain:
        return Held(tensor.requires_grad, None if tensor.is_inference() else tensor._version, None)
    values = _read_tensor(tensor) if copied else None
    return Held(tensor.requires_grad, _digest(tensor) if values is None else None, values)


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    """Return the sum of a tensor's bits: writing through `.data` does not count as a new version of it."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return tuple(tensor.shape), tensor.dtype, int(flat.view(integers).sum(dtype=torch.int64))


def _write_held(tensor: Tensor, content: Held) -> None:
    if tensor.requires_grad != content.trained:
        tensor.requires_grad_(content.trained)
    _write_tensor(tensor, content.values)


def _same_held(one: Held, other: Held) -> bool:
    if one.values is not None and other.values is not None:
        return one.trained == other.trained and _same_tensor(one.values, other.values)
    return (one.trained, one.mark) == (other.trained, other.mark)


def _read_cell(cell: CellType) -> dict[str, Any]:
    try:
        return {"cell_contents": cell.cell_contents}
    except ValueError:  # a variable that has no value yet
        return {}


def _write_cell(cell: CellType, content: Mapping[str, Any]) -> None:
    value = content["cell_contents"]
    if value is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


DICT = Kind(lambda item: dict(dict.items(item)), write_keys, same_value, keyed=True)
ATTRIBUTES = Kind(lambda item: dict(vars(item)), lambda item, new: write_keys(vars(item), new), same_value, keyed=True)
SLOTS = Kind(
    lambda item: {name: getattr(item, name) for name in _slot_names(item)}, _write_slots, same_value, keyed=True
)
LIST = Kind(list, _write_list, _same_items)
SET = Kind(set, _write_set, lambda one, other: one == other)
TENSOR = Kind(_read_tensor, _write_tensor, _same_tensor)
ARRAY = Kind(_read_array, _write_array, _same_array)
TORCH_GENERATOR = Kind(lambda item: item.get_state(), lambda item, new: item.set_state(new), _same_tensor)
NUMPY_GENERATOR = Kind(
    lambda item: copy.deepcopy(item.bit_generator.state),
    lambda item, new: setattr(item.bit_generator, "state", new),
    lambda one, other: repr(one) == repr(other),
)
NUMPY_STATE = Kind(
    lambda item: item.get_state(legacy=True),
    lambda item, new: item.set_state(new),
    lambda one, other: one[2:] == other[2:] and bool((one[1] == other[1]).all()),
)
RANDOM = Kind(lambda item: item.getstate(), lambda item, new: item.setstate(new), lambda one, other: one == other)
CELL = Kind(_read_cell, _write_cell, same_value, keyed=True)
_BYTES = Kind(bytes, lambda item, new: item.__setitem__(slice(None), new), lambda one, other: one == other)
HELD = Kind(lambda item: read_held(item, looked_at=False, copied=False), _write_held, _same_held)
EMPTY: dict[type, Kind] = {dict: DICT, OrderedDict: DICT, list: LIST, set: SET}
FILE = Kind(lambda item: item.tell(), lambda item, new: item.seek(new), lambda one, other: one == other)


@functools.cache
def kind_of(type_: type) -> Kind | None:
    """Return how objects of a type are recorded, or None if they have no content beside their attributes."""
    if issubclass(type_, Tensor):
        return TENSOR
    for types, kind in (
        (list, LIST), (deque, LIST), (set, SET), (dict, DICT), (bytearray, _BYTES), (np.ndarray, ARRAY), (CellType, CELL),
        (torch.Generator, TORCH_GENERATOR), (np.random.Generator, NUMPY_GENERATOR), (np.random.RandomState, NUMPY_STATE),
        (random.Random, RANDOM),
    ):  # fmt: skip
        if issubclass(type_, types):
            return kind
    return None
