"""Remember the state of Python objects and put it back, so that user code can run a second time without a trace.

An `ObjectState` walks everything that can be reached from some objects: attributes, containers, buffers, metrics, arrays and
random generators. Parts of it can be compared with another state of the same objects and written back in place.

Parameters and the tensors of optimizers' states are recorded with a checksum, and copied as far as `BUDGET` goes. Elements of
containers longer than `LONG` are not walked. Out of reach: files that were written, other processes, objects of C extensions.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Collection, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import (
    ABSENT,
    ARRAY,
    ATOMS,
    ATTRIBUTES,
    DICT,
    ELSEWHERE,
    EMPTY,
    FILE,
    HELD,
    LIST,
    SLOTS,
    TENSOR,
    WHOLE,
    Held,
    Kind,
    Slot,
    kind_of,
    read_held,
    write_keys,
)

# Containers of more elements are copied, but their elements are not walked.
LONG = 4096
# Parameters and optimizers' tensors are copied up to this many bytes in all.
BUDGET = 1 << 28
_OPAQUE = (type, BuiltinFunctionType, ModuleType)
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


@functools.cache
def _is_atom(type_: type) -> bool:
    """Tell whether objects of a type hold no state, or none that is ours to record."""
    return issubclass(type_, (*ATOMS, *_OPAQUE))


@functools.cache
def _is_machinery(type_: type) -> bool:
    home = f"{type_.__module__}.{type_.__qualname__}"
    return home.startswith(_EXCEPT) or (_in_machinery(home) and not issubclass(type_, nn.Module))


def _in_machinery(home: str) -> bool:
    named = any(home.startswith(f"{package}.") for package in _MACHINERY)
    return named and not home.startswith(_STATEFUL)


class ObjectState:
    """The state of everything that can be reached from `roots`, as it is now.

    Args:
        roots: objects to begin with.
        skip: ids of objects that are neither recorded nor walked; of parameters, only `requires_grad` is recorded.
        shallow: objects whose attributes are recorded, but not walked.
        copied: ids of parameters and optimizers' tensors that are copied whatever their size.

    Attributes:
        streams: names of attributes that hold a generator or another iterator that cannot be copied: using it a second time
            would use it up.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        *,
        skip: Iterable[int] = (),
        shallow: Iterable[Any] = (),
        copied: Collection[int] = (),
    ) -> None:
        self._records: dict[int, tuple[Any, Kind, Any]] = {}
        self._skip = frozenset(skip)
        self._seen: set[int] = set(self._skip)
        self._copied, self._budget = copied, BUDGET
        # What parameters and optimizers' tensors are called, for messages.
        self._names: dict[int, str] = {}
        self._keep: list[Any] = []  # ids stay taken while their objects are alive
        self.streams: list[str] = []
        self._copies: dict[Slot, Any] = {}
        # Records of modules' dictionaries of layers, parameters and hooks.
        self._structure: set[int] = set()
        for item in shallow:
            self._record(item, ATTRIBUTES)
            self._seen.add(id(item))
        self._walk([(item, type(item).__name__) for item in roots])

    # Reading --------------------------------------------------------------------------------------------------------

    def _record(self, item: Any, kind: Kind) -> Any:
        # An object can have attributes beside its content (a dictionary of a class of one's own): these come under -id.
        key = id(item) if kind not in (ATTRIBUTES, SLOTS) else -id(item)
        content = kind.read(item)
        self._records[key] = (item, kind, content)
        return content

    def _walk(self, stack: list[tuple[Any, str]]) -> None:
        while stack:
            item, name = stack.pop()
            type_ = type(item)
            # torch marks a parameter that is a tensor of a class of its own by an attribute
            if isinstance(item, Tensor) and isinstance(item, nn.Parameter):
                self._hold(item, name)
                continue
            if id(item) in self._seen or _is_atom(type_):
                continue
            self._seen.add(id(item))
            if (inner := _inside(item)) is not None:
                stack.extend((part, name) for part in inner)
                continue
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
            kind = kind_of(type_)
            if kind is not None:
                content = self._record(item, kind)
                if kind.keyed:
                    self._descend(item, content, name, stack)
                elif kind is LIST and not _plain(content):
                    stack.extend((part, f"{name}[{number}]") for number, part in enumerate(content))
                elif kind is ARRAY and content is not None and content.dtype.hasobject and content.size <= LONG:
                    stack.extend((part, name) for part in content.ravel().tolist())
                if kind is TENSOR or kind is ARRAY or type_.__module__ in ("builtins", "collections"):
                    continue
            if _is_machinery(type_):
                continue
            # A class can have both `__slots__` and a `__dict__`; the dictionary holds what its instances were given.
            if hasattr(item, "__dict__"):
                self._descend(item, self._record(item, ATTRIBUTES), name, stack, attributes=True)
            elif hasattr(type_, "__slots__") and kind is None:
                self._descend(item, self._record(item, SLOTS), name, stack, attributes=True)

    def _hold(self, tensor: Tensor, name: str) -> None:
        """Record a parameter or a tensor of an optimizer's state."""
        if id(tensor) in self._records:
            return
        looked_at = id(tensor) not in self._skip
        copied = looked_at and (id(tensor) in self._copied or tensor.nbytes <= self._budget)
        self._budget -= tensor.nbytes if copied else 0
        self._names[id(tensor)] = re.sub(r"\._(?:modules|parameters)\['([^']+)'\]", r".\1", name)
        self._records[id(tensor)] = (tensor, HELD, read_held(tensor, looked_at=looked_at, copied=copied))

    def _hold_state(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Record an optimizer's state: which tensors it has, and their values."""
        for held in (optimizer.state, *optimizer.state.values()):
            if isinstance(held, dict) and id(held) not in self._seen:
                self._seen.add(id(held))
                self._record(held, DICT)
                for key, value in held.items():
                    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                        self._hold(value, f"{name}.state[…][{key!r}]")

    def _record_file(self, file: Any, name: str) -> None:
        if file.closed or not file.readable():
            return
        try:
            self._record(file, FILE)
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
            self._hold_state(item, name)
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
            if type_ in EMPTY and not value:  # most dictionaries of a module
                self._seen.add(id(value))
                self._record(value, EMPTY[type_])
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

    def uncopied(self, now: ObjectState) -> dict[int, tuple[Tensor, str]]:
        """Return the parameters and optimizers' tensors, by id with names, that have changed and of which there is no copy."""
        found: dict[int, tuple[Tensor, str]] = {}
        for key, name in self._names.items():
            mine: Held = self.get((key, WHOLE))
            theirs: Any = now.get((key, WHOLE)) if now.knows((key, WHOLE)) else None
            if theirs is None or ELSEWHERE in (mine.mark, theirs.mark):
                continue
            if mine.values is None and theirs.values is None and mine.mark != theirs.mark:
                found[key] = self._records[key][0], name
        return found

    def put_back(self, now: ObjectState) -> None:
        """Bring all objects of this state back to it; `now` is their present state."""
        different = [slot for slot in self.differences(now) if self.knows(slot)]
        self.write({slot: self.get(slot) for slot in different})
        # A key that came back lies at the end; the order of layers and parameters is part of the state.
        for key in {slot[0] for slot in different}:
            item, kind, content = self._records[key]
            if kind is DICT and list(item) != list(content):
                write_keys(item, dict.fromkeys(list(item), ABSENT))
                write_keys(item, content)


def _plain(values: Any) -> bool:
    """Tell whether the elements need not be walked: all of them plain, or too many of them."""
    if len(values) > LONG:
        return True
    return all(_is_atom(type(value)) for value in values)


def _inside(item: Any) -> Iterable[Any] | None:
    """Return the objects that a function has in its closure, a method is of, or a partial call holds; else None."""
    if isinstance(item, FunctionType):
        return () if _in_machinery(f"{item.__module__}.") else item.__closure__ or ()
    if isinstance(item, MethodType):
        return (item.__self__, item.__func__)
    if isinstance(item, functools.partial):
        return (item.func, item.args, item.keywords)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return None
