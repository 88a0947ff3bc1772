"""Remember the state of Python objects and put it back, so that user code can run a second time without a trace.

An `ObjectState` walks everything that can be reached from some objects: attributes, containers, buffers, metrics, arrays and
random generators. Parts of it can be compared with another state of the same objects and written back in place.

Out of reach: files that were written, other processes, objects of C extensions. Parameters are not recorded: nobody changes
them in an evaluation, and whoever does is told (`soups.averaging.swapping`).
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import io
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Tensors and arrays above this many bytes are not copied.
LARGE = 1 << 28
# Containers of more elements are copied, but their elements are not walked.
LONG = 4096
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


def _write_keys(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
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


_DICT = Kind(lambda item: dict(dict.items(item)), _write_keys, same_value, keyed=True)
_ATTRIBUTES = Kind(
    lambda item: dict(vars(item)), lambda item, new: _write_keys(vars(item), new), same_value, keyed=True
)
_SLOTS = Kind(
    lambda item: {name: getattr(item, name) for name in _slot_names(item)}, _write_slots, same_value, keyed=True
)
_LIST = Kind(list, _write_list, _same_items)
_SET = Kind(set, _write_set, lambda one, other: one == other)
_TENSOR = Kind(_read_tensor, _write_tensor, _same_tensor)
_ARRAY = Kind(_read_array, _write_array, _same_array)
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


_EMPTY: dict[type, Kind] = {dict: _DICT, OrderedDict: _DICT, list: _LIST, set: _SET}
_FILE = Kind(lambda item: item.tell(), lambda item, new: item.seek(new), lambda one, other: one == other)


@functools.cache
def _kind_of(type_: type) -> Kind | None:
    """Return how objects of a type are recorded, or None if they have no content beside their attributes."""
    if issubclass(type_, Tensor):
        return _TENSOR
    for types, kind in (
        (list, _LIST), (deque, _LIST), (set, _SET), (dict, _DICT), (np.ndarray, _ARRAY), (torch.Generator, _TORCH_GENERATOR),
        (np.random.Generator, _NUMPY_GENERATOR), (np.random.RandomState, _NUMPY_STATE), (random.Random, _RANDOM),
    ):  # fmt: skip
        if issubclass(type_, types):
            return kind
    return None


@functools.cache
def _is_atom(type_: type) -> bool:
    """Tell whether objects of a type hold no state, or none that is ours to record."""
    return issubclass(type_, (*_ATOMS, *_OPAQUE, nn.Parameter))


@functools.cache
def _is_machinery(type_: type) -> bool:
    home = f"{type_.__module__}.{type_.__qualname__}"
    if home.startswith(_EXCEPT):
        return True
    named = any(home.startswith(f"{package}.") for package in _MACHINERY)
    return named and not home.startswith(_STATEFUL) and not issubclass(type_, nn.Module)


class ObjectState:
    """The state of everything that can be reached from `roots`, as it is now.

    Args:
        roots: objects to begin with.
        skip: ids of objects that are neither recorded nor walked.
        shallow: objects whose attributes are recorded, but not walked.

    Attributes:
        streams: names of attributes that hold a generator or another iterator that cannot be copied: using it a second time
            would use it up.
    """

    def __init__(self, roots: Iterable[Any], *, skip: Iterable[int] = (), shallow: Iterable[Any] = ()) -> None:
        self._records: dict[int, tuple[Any, Kind, Any]] = {}
        self._seen: set[int] = set(skip)
        self._keep: list[Any] = []  # ids stay taken while their objects are alive
        self.streams: list[str] = []
        self._copies: dict[Slot, Any] = {}
        # Records of modules' dictionaries of layers, parameters and hooks.
        self._structure: set[int] = set()
        for item in shallow:
            self._record(item, _ATTRIBUTES)
            self._seen.add(id(item))
        self._walk([(item, type(item).__name__) for item in roots])

    # Reading --------------------------------------------------------------------------------------------------------

    def _record(self, item: Any, kind: Kind) -> Any:
        # An object can have attributes beside its content (a dictionary of a class of one's own): these come under -id.
        key = id(item) if kind not in (_ATTRIBUTES, _SLOTS) else -id(item)
        content = kind.read(item)
        self._records[key] = (item, kind, content)
        return content

    def _walk(self, stack: list[tuple[Any, str]]) -> None:
        while stack:
            item, name = stack.pop()
            type_ = type(item)
            if id(item) in self._seen or _is_atom(type_):
                continue
            # torch marks a parameter that is a tensor of a class of its own by an attribute
            if isinstance(item, Tensor) and isinstance(item, nn.Parameter):
                continue
            self._seen.add(id(item))
            if hasattr(type_, "__next__"):
                if isinstance(item, io.IOBase):
                    self._record_file(item, name)
                elif isinstance(item, GeneratorType):
                    self.streams.append(name)
                continue
            if isinstance(item, tuple | frozenset):
                self._keep.append(item)
                stack.extend((part, name) for part in item)
                continue
            kind = _kind_of(type_)
            if kind is not None:
                content = self._record(item, kind)
                if kind.keyed:
                    self._descend(item, content, name, stack)
                elif kind is _LIST and not _plain(content):
                    stack.extend((part, f"{name}[{number}]") for number, part in enumerate(content))
                if kind is _TENSOR or kind is _ARRAY or type_.__module__ in ("builtins", "collections"):
                    continue
            if _is_machinery(type_):
                continue
            # A class can have both `__slots__` and a `__dict__`; the dictionary holds what its instances were given.
            if hasattr(item, "__dict__"):
                self._descend(item, self._record(item, _ATTRIBUTES), name, stack, attributes=True)
            elif hasattr(type_, "__slots__") and kind is None:
                self._descend(item, self._record(item, _SLOTS), name, stack, attributes=True)

    def _record_file(self, file: Any, name: str) -> None:
        if file.closed or not file.readable():
            return
        try:
            self._record(file, _FILE)
        except (OSError, ValueError):  # a pipe, or a text file in the middle of an iteration
            self.streams.append(name)

    def _descend(
        self,
        item: Any,
        content: Mapping[Any, Any],
        name: str,
        stack: list[tuple[Any, str]],
        *,
        attributes: bool = False,
    ) -> None:
        if isinstance(item, torch.optim.Optimizer):
            # No step is taken in an evaluation; a copy of the state would be twice the weights.
            content = {key: value for key, value in content.items() if key != "state"}
        if not attributes and _plain(content.values()):
            return
        if attributes and isinstance(item, nn.Module):
            parts = [content[key] for key in content if key in ("_modules", "_parameters") or key.endswith("_hooks")]
            self._structure.update(map(id, parts))
        for key, value in content.items():
            type_ = type(value)
            if _is_atom(type_) or id(value) in self._seen:
                continue
            if type_ in _EMPTY and not value:  # most dictionaries of a module
                self._seen.add(id(value))
                self._record(value, _EMPTY[type_])
                continue
            place = f"{name}.{key}" if attributes else f"{name}[{key!r}]"
            if hasattr(type_, "__next__") and not isinstance(value, GeneratorType) and not _is_machinery(type_):
                try:
                    self._copies[-id(item) if attributes else id(item), key] = copy.copy(value)
                except TypeError:
                    self.streams.append(place)
            stack.append((value, place))

    def structural(self, slot: Slot) -> bool:
        """Tell whether a place is about which layers, parameters and hooks a module has."""
        return slot[0] in self._structure or isinstance(self.get(slot), nn.Module)

    # Slots ----------------------------------------------------------------------------------------------------------

    def slots(self) -> Iterable[Slot]:
        """Return all places that were recorded."""
        for key, (_, kind, content) in self._records.items():
            if kind.keyed:
                for name in content:
                    yield key, name
            else:
                yield key, WHOLE

    def get(self, slot: Slot) -> Any:
        """Return what a place holds in this state; `ABSENT` if the object does not have it."""
        _, kind, content = self._records[slot[0]]
        return content.get(slot[1], ABSENT) if kind.keyed else content

    def knows(self, slot: Slot) -> bool:
        """Tell whether the object of a place was reached."""
        return slot[0] in self._records

    def owner(self, slot: Slot) -> tuple[Any, Kind]:
        """Return the object of a place and how it is read and written."""
        item, kind, _ = self._records[slot[0]]
        return item, kind

    def same(self, slot: Slot, other: ObjectState) -> bool:
        """Tell whether a place holds the same in both states; False where one of them does not know its object."""
        if not (self.knows(slot) and other.knows(slot)):
            return False
        return self._records[slot[0]][1].same(self.get(slot), other.get(slot))

    def differences(self, other: ObjectState) -> list[Slot]:
        """Return the places that differ, or whose objects only one of the states knows."""
        found = {slot: None for slot in self.slots() if not self.same(slot, other)}
        found |= {slot: None for slot in other.slots() if not (self.knows(slot) and self._has(slot))}
        return list(found)

    def _has(self, slot: Slot) -> bool:
        _, kind, content = self._records[slot[0]]
        return not kind.keyed or slot[1] in content

    # Writing --------------------------------------------------------------------------------------------------------

    def lend_iterators(self) -> None:
        """Put copies in place of iterators, for user code to use up; `put_back` brings the iterators themselves back."""
        self.write({slot: copy.copy(value) for slot, value in self._copies.items()})

    def write(self, values: Mapping[Slot, Any]) -> None:
        """Write values into the places of this state's objects."""
        by_object: dict[int, dict[Any, Any]] = {}
        for (key, name), value in values.items():
            by_object.setdefault(key, {})[name] = value
        for key, content in by_object.items():
            if key in self._records:
                item, kind, _ = self._records[key]
                kind.write(item, content if kind.keyed else content[WHOLE])

    def put_back(self, now: ObjectState) -> None:
        """Bring all objects of this state back to it; `now` is their present state."""
        different = [slot for slot in self.differences(now) if self.knows(slot)]
        self.write({slot: self.get(slot) for slot in different})
        # A key that came back lies at the end; the order of layers and parameters is part of the state.
        for key in {slot[0] for slot in different}:
            item, kind, content = self._records[key]
            if kind is _DICT and list(item) != list(content):
                _write_keys(item, dict.fromkeys(list(item), ABSENT))
                _write_keys(item, content)


def _plain(values: Any) -> bool:
    """Tell whether the elements need not be walked: all of them plain, or too many of them."""
    if len(values) > LONG:
        return True
    return all(_is_atom(type(value)) for value in values)
