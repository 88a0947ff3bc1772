"""Torch's zip archives (`.pt`, `.pth`, `.bin`, `.ckpt`), read lazily and without ever running their pickle.

`torch.save` writes a pickle that says how tensors are put together, and one uncompressed zip entry for each storage. Our
unpickler knows a handful of harmless names (tensor rebuilders, dtypes, `OrderedDict`) and answers each with a function of
its own; every other name becomes an inert `Opaque` note of what was asked for. Nothing from the file is imported or called.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch

from soups.errors import StorageError
from soups.stores.sources import ByteSource, open_bytes
from soups.stores.store import TensorMeta

# A pickle larger than this describes no checkpoint; it would only fill the memory.
_MAX_PICKLE = 512 * 2**20
# Modules that no checkpoint needs and every attack does.
_HOSTILE = frozenset((
    "builtins", "__builtin__", "os", "posix", "nt", "posixpath", "ntpath", "subprocess", "sys", "runpy",
    "importlib", "imp", "socket", "shutil", "pty", "commands", "ctypes", "code", "codeop", "pickle", "_pickle",
    "marshal", "types", "inspect", "webbrowser", "asyncio", "multiprocessing", "threading", "bdb", "pdb", "timeit",
    "pip", "cffi", "operator", "functools", "urllib", "http", "tempfile", "pathlib", "zipimport", "gc", "signal",
    "platform",
))  # fmt: skip
_HARMLESS_BUILTINS = {"set": set, "frozenset": frozenset, "complex": complex, "bytearray": bytearray, "slice": slice}
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


class Storage(NamedTuple):
    """A storage as the pickle names it: `key` is its zip entry, `numel` counts elements of `dtype`."""

    dtype: torch.dtype
    key: str
    numel: int


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage; `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def meta(self) -> TensorMeta:
        """Shape and dtype."""
        return TensorMeta(self.shape, self.dtype)

    @property
    def span(self) -> int:
        """Elements from the first to the last one of the view, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class Opaque:
    """What stands for an object that the pickle wanted to make by code we do not run."""

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def __repr__(self) -> str:
        return f"<not loaded: {self.name}>"

    def __hash__(self) -> int:
        return id(self)

    def append(self, _: Any) -> None:
        """Ignore list items (a list subclass)."""

    def extend(self, _: Any) -> None:
        """Ignore list items (a list subclass)."""

    def __setitem__(self, *_: Any) -> None:
        """Ignore dict items (a dict subclass)."""


class OrderedDict(collections.OrderedDict[Any, Any]):
    """An `OrderedDict` whose state (a module's `_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes: they are notes for `load_state_dict`, and setting them would be the file's choice."""


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    return _record(storage, offset, shape, stride, storage.dtype)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a dtype")
    untyped = Storage(dtype, storage.key, storage.numel // dtype.itemsize)
    return _record(untyped, offset, shape, stride, dtype)


def _record(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype) -> TensorRecord:
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(isinstance(number, int) and 0 <= number < 2**48 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and stride {stride} at {offset}")
    record = TensorRecord(storage, offset, tuple(shape), tuple(stride), dtype)
    if offset + record.span > storage.numel:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} that reaches past its storage")
    return record


def _parameter(data: Any, *_: Any) -> Any:
    return data


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": tuple,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _KNOWN:
            return _KNOWN[name]
        if module_name in ("torch", "torch.storage") and global_name in _STORAGES:
            return _STORAGES[global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name in ("builtins", "__builtin__") and global_name in _HARMLESS_BUILTINS:
            return _HARMLESS_BUILTINS[global_name]
        if module_name.partition(".")[0] in _HOSTILE and not module_name.startswith("pathlib"):
            raise _HostileError(name)

        class Unknown(Opaque):
            def __init__(self, *_: Any, **__: Any) -> None:
                super().__init__(name)

        return Unknown

    def persistent_load(self, pid: Any, /) -> Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"a reference to {pid!r}"[:200])
        return Storage(dtype, str(key), numel)


class _HostileError(Exception):
    """The pickle asks for something that no checkpoint needs."""


class TorchArchive:
    """A torch zip archive: its object tree, with a `TensorRecord` in the place of each tensor, and where storages lie.

    Raises:
        StorageError: the file is absent, truncated, compressed, in torch's old format, or asks to run code.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source: ByteSource = open_bytes(path)
        try:
            self._offsets, data = self._open()
            self.root = self._unpickle(data)
        except BaseException:
            self.source.close()
            raise

    def _open(self) -> tuple[dict[str, tuple[int, int]], bytes]:
        where = self.source.location
        start = self.source.read(0, min(4, self.source.size))
        if start[:2] != b"PK":
            raise StorageError(
                f"{where} is not a torch zip archive. If it is a checkpoint from torch before 1.6, load it there and save "
                f"it again; if it was cut off or damaged, copy or make it again."
            )
        try:
            with self.source.open() as file, zipfile.ZipFile(file) as archive:
                entries = {info.filename: info for info in archive.infolist()}
                if len(entries) != len(archive.infolist()):
                    raise zipfile.BadZipFile("two entries of one name")
                pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise zipfile.BadZipFile(f"{len(pickles)} entries called data.pkl, where one was expected")
                prefix = pickles[0].removesuffix("data.pkl")
                if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
                    raise zipfile.BadZipFile("compressed entries; torch writes none")
                if entries[pickles[0]].file_size > min(_MAX_PICKLE, self.source.size):
                    raise zipfile.BadZipFile("an impossibly large data.pkl")
                order = archive.read(prefix + "byteorder") if prefix + "byteorder" in entries else b"little"
                if order != b"little":
                    raise zipfile.BadZipFile("numbers in big-endian order, which is not supported")
                data = archive.read(pickles[0])
            offsets = {
                name.removeprefix(prefix + "data/"): self._data_offset(info)
                for name, info in entries.items()
                if name.startswith(prefix + "data/")
            }
        except (
            zipfile.BadZipFile,
            struct.error,
            EOFError,
            OSError,
            ValueError,
            NotImplementedError,
            KeyError,
        ) as error:
            raise StorageError(
                f"{where} is not a whole torch archive: {error}. It may have been cut off while it was copied; copy or make "
                f"it again."
            ) from error
        return offsets, data

    def _data_offset(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        # The central directory does not say how long the local header is: torch pads it to align the data.
        local = self.source.read(info.header_offset, 30)
        if local[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no entry where {info.filename!r} should begin")
        name, extra = struct.unpack("<HH", local[26:30])
        begin = info.header_offset + 30 + name + extra
        if begin + info.file_size > self.source.size:
            raise zipfile.BadZipFile(f"entry {info.filename!r} ends past the end of the file")
        return begin, info.file_size

    def _unpickle(self, data: bytes) -> Any:
        where = self.source.location
        try:
            return _Unpickler(io.BytesIO(data), encoding="utf-8").load()
        except _HostileError as error:
            raise StorageError(
                f"{where} asks to run {error} when it is loaded. No checkpoint needs that: it was refused and nothing was "
                f"run. Do not load it with other tools; get the weights as safetensors from someone you trust."
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            raise StorageError(
                f"{where} holds a damaged or foreign pickle ({type(error).__name__}: {error}). Copy or make it again, or "
                f"convert it to safetensors."[:1000]
            ) from error

    def place(self, record: TensorRecord) -> int:
        """Return the byte offset of a record's first element in the file.

        Raises:
            StorageError: the storage is absent or shorter than the pickle says.
        """
        found = self._offsets.get(record.storage.key)
        if found is None or found[1] < record.storage.numel * record.storage.dtype.itemsize:
            raise StorageError(
                f"{self.source.location}: storage {record.storage.key!r} is {'absent' if found is None else 'too short'}. "
                f"The file is damaged; copy or make it again."
            )
        return found[0] + record.offset * record.dtype.itemsize

    def close(self) -> None:
        """Close the file."""
        self.source.close()


def tensor_maps(root: Any) -> dict[str, Mapping[str, TensorRecord]]:
    """Find every map from text to tensors in an object tree, by its path: `""` for the root, `"state_dict"`, `"a.b"`.

    A map qualifies when at least half of its entries, and at least one, are tensors; entries of other kinds are left out.
    """
    found: dict[str, Mapping[str, TensorRecord]] = {}
    seen: set[int] = set()

    def visit(value: Any, path: str, depth: int) -> None:
        if not isinstance(value, dict) or id(value) in seen or depth > 6:
            return
        seen.add(id(value))
        entries = cast("dict[Any, Any]", value)
        tensors = {
            key: item for key, item in entries.items() if isinstance(key, str) and isinstance(item, TensorRecord)
        }
        if tensors and 2 * len(tensors) >= len(entries):
            found[path] = tensors
        for key, item in entries.items():
            if isinstance(item, dict):
                visit(item, f"{path}.{key}" if path else str(key), depth + 1)

    visit(root, "", 0)
    return found
