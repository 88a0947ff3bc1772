"""An unpickler that runs nothing: what torch's files are made of becomes plain values, everything else an inert note.

A pickle is a program that calls functions by name. This one knows a handful of harmless names (tensor rebuilders, dtypes, plain
containers) and answers each with a function of its own. Every other name becomes an `Opaque` class, whose instances keep what
they were given and do nothing. Names that only an attack needs (`os.system`, `builtins.exec`, …) are refused aloud, so that the
file is not loaded with another tool afterwards.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

import torch

from soups.stores.store import TensorMeta

# Modules of which a checkpoint needs nothing, and whose names run programs, load code, or reach files and networks.
_HOSTILE_MODULES = frozenset((
    "os", "posix", "nt", "subprocess", "_posixsubprocess", "pty", "popen2", "sys", "runpy", "importlib", "imp",
    "_frozen_importlib", "zipimport", "pkgutil", "pkg_resources", "socket", "shutil", "ctypes", "_ctypes", "cffi",
    "codeop", "marshal", "webbrowser", "bdb", "pdb", "timeit", "cProfile", "doctest", "pydoc", "pip", "ensurepip",
    "venv", "idlelib", "distutils", "setuptools", "platform", "urllib", "urllib2", "http", "httplib", "ftplib",
    "smtplib", "telnetlib", "requests", "httpx", "aiohttp", "ssl", "signal", "gc", "pickle", "_pickle", "shelve",
    "IPython", "asyncio",
))  # fmt: skip
# What of those modules is a type of plain data, or loads nothing.
_PLAIN_TYPES = frozenset((
    "os.PathLike", "os.stat_result", "os.terminal_size", "posix.stat_result", "platform.uname_result", "signal.Signals",
    "signal.Handlers", "http.HTTPStatus", "urllib.parse.ParseResult", "urllib.parse.SplitResult",
))  # fmt: skip
_HOSTILE_NAMES = frozenset((
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "exec", "eval", "compile", "__import__", "open", "execfile", "input", "breakpoint", "globals", "locals", "apply",
        "delattr", "setattr", "file", "reload", "exit", "quit", "help",
    )),
    "types.CodeType", "types.FunctionType", "types.LambdaType", "io.open", "_io.open", "io.open_code", "_io.open_code",
    "io.FileIO", "_io.FileIO", "tempfile.mkstemp", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads",
    "dill._dill.load", "dill._dill.loads", "joblib.load", "numpy.load", "pandas.read_pickle", "torch.load", "torch.jit.load",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.serialization.load", "torch.package.PackageImporter",
    "torch.utils.collect_env.run", "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
    "torch.ops.load_library", "torch.classes.load_library", "numpy.testing._private.utils.runstring",
    "numpy.testing._private.utils.rundocs", "pathlib.Path.unlink", "pathlib.Path.write_text", "pathlib.Path.write_bytes",
    # Modules whose names are also those of people's own packages; protocol 2 writes subprocess as commands.
    "code.interact", "code.InteractiveInterpreter", "code.InteractiveConsole", "trace.Trace", "profile.run", "profile.runctx",
    *(f"commands.{name}" for name in (
        "Popen", "run", "call", "check_call", "check_output", "getoutput", "getstatusoutput",
    )),
    "multiprocessing.util.spawnv_passfds", "test.support.script_helper.assert_python_ok", "lib2to3.pgen2.grammar.Grammar.loads",
))  # fmt: skip
# Legitimate in pickled methods and enumerations; an attack when one of these is looked up.
_LOOKUPS = frozenset(("builtins.getattr", "__builtin__.getattr", "operator.attrgetter", "operator.methodcaller",
                      "_operator.attrgetter", "_operator.methodcaller"))  # fmt: skip
_HOSTILE_ATTRIBUTES = frozenset((
    "system", "popen", "exec", "eval", "compile", "__import__", "__builtins__", "__globals__", "__subclasses__", "__code__",
    "import_module", "run_module", "check_output", "Popen", "__reduce__", "__getattribute__",
))  # fmt: skip
# Packages whose tensor subclasses hold codes, not values.
_QUANTISED = frozenset(("bitsandbytes", "torchao", "hqq", "quanto", "optimum", "auto_gptq", "awq"))
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


class HostileError(Exception):
    """The pickle asks for something that only an attack needs."""


class Storage(NamedTuple):
    """A storage as the pickle names it: `key` is its entry in the file, `numel` counts elements of `dtype`.

    Attributes:
        begin: first element, where this is a part of the entry (files from before torch 0.4).
    """

    dtype: torch.dtype
    key: str
    numel: int
    begin: int = 0


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it: a strided view of a storage; `offset` and `stride` count elements.

    Attributes:
        conj, neg: whether the values are the complex conjugate, or the negative, of the elements in the file.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conj: bool = False
    neg: bool = False

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
    def direct(self) -> bool:
        """Whether the bytes in the file are the tensor's: row-major, without gaps, and with their own signs."""
        if self.conj or self.neg:
            return False
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """Return the tensor, given the `span` elements that it views."""
        tensor = torch.as_strided(elements, self.shape, self.stride)
        if self.conj:
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if self.neg else tensor


class Opaque:
    """What stands for an object that the pickle wanted to make by code we do not run.

    Attributes:
        name: of the class or function.
        state: what the object would have been given, inert as well.
    """

    name = "an object"
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> Opaque:
        """Look at what is looked up; make the note."""
        if cls.name in _LOOKUPS and (found := _HOSTILE_ATTRIBUTES.intersection(_texts(arguments))):
            raise HostileError(f"{cls.name} to reach {sorted(found)[0]!r}")
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state as plain data."""
        self.state = state

    def __call__(self, *_: Any, **__: Any) -> Opaque:
        """Return another note: a function's result, or what a class factory made."""
        return _opaque_class(f"{self.name}(…)")()

    def __repr__(self) -> str:
        return f"<not loaded: {self.name}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def _ignore(self, *_: Any) -> None: ...

    # List, set and dict subclasses are filled through these.
    append = extend = add = update = __setitem__ = _ignore

    @property
    def is_module(self) -> bool:
        """Whether this is a pickled `torch.nn.Module`."""
        return isinstance(self.state, dict) and {"_parameters", "_modules"} <= set(cast("dict[Any, Any]", self.state))


def _opaque_class(full_name: str) -> type[Opaque]:
    return type("Unknown", (Opaque,), {"name": full_name})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.split(".")
    elif isinstance(value, tuple | list):
        for item in cast("list[Any]", value):
            yield from _texts(item)


class OrderedDict(collections.OrderedDict[Any, Any]):
    """An `OrderedDict` whose state (a module's `_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes: they are notes for `load_state_dict`, and setting them would be the file's choice."""


class PlainDict(dict[Any, Any]):
    """A `defaultdict` or `Counter` without its factory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(argument for argument in arguments if isinstance(argument, dict)))

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes."""


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> TensorRecord:
    return _record(storage, offset, shape, stride, storage.dtype, more[2] if len(more) > 2 else None)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRecord:
    if not isinstance(dtype, torch.dtype) or not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a dtype or a storage")
    nbytes = storage.numel * storage.dtype.itemsize
    typed = Storage(dtype, storage.key, nbytes // dtype.itemsize)
    return _record(typed, offset, shape, stride, dtype, metadata)


def _record(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype, metadata: Any) -> TensorRecord:
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(isinstance(number, int) and 0 <= number < 2**48 for number in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and stride {stride} at {offset}")
    bits = cast("dict[Any, Any]", metadata) if isinstance(metadata, dict) else {}
    record = TensorRecord(
        storage,
        storage.begin + offset,
        tuple(shape),
        tuple(stride),
        dtype,
        bool(bits.get("conj")),
        bool(bits.get("neg")),
    )
    if offset + record.span > storage.numel:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} that reaches past its storage")
    return record


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Return the bytes that protocol 2 writes as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}"[:100])
    return text.encode("latin1")


def _first(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return the plain tensor behind a tensor subclass (a parameter with attributes, say)."""
    del state
    package = kind.name.partition(".")[0] if isinstance(kind, type) and issubclass(kind, Opaque) else ""
    made = function(*arguments)
    if package in _QUANTISED and isinstance(kind, type):
        return kind()
    return made


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": PlainDict,
    "collections.Counter": PlainDict,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": lambda function, kind, arguments, state=None: _from_type(
        function, kind, arguments, state
    ),
    "torch.Size": tuple,
    "_codecs.encode": _encode,
}
_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": set, "frozenset": frozenset, "complex": complex, "bytearray": bytearray, "slice": slice, "dict": dict, "list": list,
    "tuple": tuple, "int": int, "float": float, "bool": bool, "str": str, "bytes": bytes,
}  # fmt: skip
# Keep a hostile `bytearray(2**60)` or `list(…)` of an endless iterator from filling the memory.
_SAFE_ARGUMENTS = (str, bytes, float, bool, type(None), list, tuple, dict, set, frozenset)


def _guarded(name: str) -> Any:
    """Return a class's constructor; what it cannot safely be called with makes a note."""
    kind = _BUILTINS[name]
    if name in ("int", "complex", "slice", "float", "bool"):
        return kind

    def make(*arguments: Any) -> Any:
        return kind(*arguments) if all(isinstance(a, _SAFE_ARGUMENTS) for a in arguments) else _opaque_class(name)()

    return make


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle into plain values, `TensorRecord`s and `Opaque` notes.

    Attributes:
        storages: every storage that the pickle names, by key.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Answer a name; nothing is imported."""
        name = f"{module_name}.{global_name}"
        if name in _KNOWN:
            return _KNOWN[name]
        if module_name in ("torch", "torch.storage", "torch.cuda") and global_name in _STORAGES:
            return _STORAGES[global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name in ("builtins", "__builtin__") and global_name in _BUILTINS:
            return _guarded(global_name)
        root = module_name.partition(".")[0]
        if name in _HOSTILE_NAMES or (root in _HOSTILE_MODULES and name not in _PLAIN_TYPES):
            raise HostileError(name.replace("commands.", "subprocess.") if root == "commands" else name)
        return _opaque_class(name)

    def persistent_load(self, pid: Any, /) -> Any:
        """Answer a reference to a storage, or (in old files) to a module's source."""
        if isinstance(pid, tuple) and pid and cast("tuple[Any, ...]", pid)[0] == "module":
            return cast("tuple[Any, ...]", pid)[1]
        kind, dtype, key, _location, numel, *view = pid
        if isinstance(dtype, type) and issubclass(dtype, Opaque):  # of quantised tensors
            return dtype()
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"a reference to {pid!r}"[:200])
        storage = self.storages[str(key)] = Storage(dtype, str(key), numel)
        if view and view[0] is not None:
            _, begin, size = view[0]
            if not all(isinstance(number, int) and number >= 0 for number in (begin, size)) or begin + size > numel:
                raise pickle.UnpicklingError(f"a view {view[0]!r} of a storage of {numel}"[:200])
            return storage._replace(begin=begin, numel=size)
        return storage


def opaque_parts(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield where in an object tree something was not loaded, and its class: `("hyper_parameters.net", "my.Net")`."""
    if isinstance(value, Opaque) or (isinstance(value, type) and issubclass(value, Opaque)):
        yield path, value.name
    elif isinstance(value, dict | list | tuple | set) and depth <= 6:
        items = (
            cast("dict[Any, Any]", value).items() if isinstance(value, dict) else enumerate(cast("list[Any]", value))
        )
        for number, (key, item) in enumerate(items):
            if number >= 1000:
                break
            yield from opaque_parts(item, f"{path}.{key}" if path else str(key), depth + 1)
