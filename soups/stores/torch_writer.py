"""Torch archives (`.pt`, `.pth`, `.bin`) and Lightning checkpoints (`.ckpt`), written without holding the weights.

Slices first go to their place in a scratch file beside the output; at the end they are packed into the archive, entry by
entry, with the pickle that `torch.load(weights_only=True)` reads, mapped or not.
"""

from __future__ import annotations

import io
import pickle
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch._utils import _rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]

from soups.errors import WeightsError
from soups.stores.files import replacing, storage_errors
from soups.stores.shards import Shard
from soups.stores.store import TensorMeta
from soups.stores.writer import Writer

_PIECE = 1 << 20
# torch aligns storages to this, so that they can be mapped.
_ALIGNMENT = 64
_STORAGES = {
    torch.float32: torch.FloatStorage, torch.float64: torch.DoubleStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage, torch.complex64: torch.ComplexFloatStorage,
}  # fmt: skip
# What a checkpoint says of a run that is no longer true of the merged weights.
_DROPPED = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "current_model_state",
    "averaging_state",
    "weight_averages",
)


_NOTHING: Any = object()


class _Storage(NamedTuple):
    key: str
    meta: TensorMeta


class _Tensor:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.meta.dtype], obj.key, "cpu", obj.meta.numel)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        shape = obj.storage.meta.shape
        stride = [1] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            stride[axis] = stride[axis + 1] * max(1, shape[axis + 1])
        hooks: OrderedDict[str, Any] = OrderedDict()
        return _rebuild_tensor_v2, (obj.storage, 0, tuple(shape), tuple(stride), False, hooks)


class TorchWriter(Writer):
    """One torch archive.

    Args:
        path: the file to make. A `.ckpt` holds `{"state_dict": weights, …}`, the others the weights themselves.
        plan: every tensor to be written.
        tied: names that repeat another tensor of the plan.
        beside: further plain values for a `.ckpt`, as `plain_parts` gives them.
        overwrite: replace an existing file.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Mapping[str, TensorMeta],
        *,
        tied: Mapping[str, str] | None = None,
        beside: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(path, plan, overwrite=overwrite)
        unsupported = [name for name, meta in self.plan.items() if meta.dtype not in _STORAGES]
        if unsupported:
            name = unsupported[0]
            raise WeightsError(
                f"{path}: torch archives of {self.plan[name].dtype} ({name!r}) are not written; use safetensors."
            )
        self._tied, self._beside = dict(tied or {}), dict(beside or {})
        scratch = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        with storage_errors(self.path):
            self._shard = Shard(scratch, self.plan, {}, {})

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        self._shard.put(name, offset, data)

    def _finish(self) -> None:
        tensors = {name: _Tensor(_Storage(str(number), meta)) for number, (name, meta) in enumerate(self.plan.items())}
        weights = OrderedDict({name: tensors[self._tied.get(name, name)] for name in [*self.plan, *self._tied]})
        content = {**self._beside, "state_dict": weights} if self.path.suffix == ".ckpt" else weights
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(content)
        with (
            replacing(self.path) as temporary,
            self._shard.path.open("rb") as scratch,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr("archive/data.pkl", pickled.getvalue())
            archive.writestr("archive/byteorder", b"little")
            for number, (name, meta) in enumerate(self.plan.items()):
                scratch.seek(self._shard.start + self._shard.offsets[name])
                with archive.open(_aligned(archive, f"archive/data/{number}"), "w", force_zip64=True) as entry:
                    left = meta.nbytes
                    while left:
                        left -= entry.write(scratch.read(min(left, _PIECE)))
            archive.writestr("archive/version", b"3\n")

    def abort(self) -> None:
        """Remove the scratch file."""
        self._shard.close()
        self._shard.path.unlink(missing_ok=True)


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return an entry whose data will begin at a multiple of `_ALIGNMENT`, by a padding field in its header."""
    info = zipfile.ZipInfo(name)
    file = archive.fp
    assert file is not None
    # 30 bytes of header, the name, 20 bytes of sizes in 64 bits, 4 bytes in front of the padding.
    begin = file.tell() + 30 + len(name) + 20 + 4
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    return info


def plain_parts(root: Any) -> dict[str, Any]:
    """Return what of a checkpoint's contents stays true of other weights and is plain: hyperparameters, versions, counters.

    Args:
        root: `TorchArchive.root`.
    """
    if not isinstance(root, dict):
        return {}
    entries = {key: item for key, item in cast("dict[Any, Any]", root).items() if isinstance(key, str)}
    found = _plain({key: item for key, item in entries.items() if key not in (*_DROPPED, "state_dict")})
    return {} if found is _NOTHING else found


def _plain(value: Any) -> Any:
    """Return a value without what is not plain in it, or `_NOTHING`. A list is plain as a whole or not at all."""
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        kept = {key: _plain(item) for key, item in entries.items() if _plain(key) is not _NOTHING}
        kept = {key: item for key, item in kept.items() if item is not _NOTHING}
        return kept if kept or not entries else _NOTHING
    if type(value) in (list, tuple, set):
        items = [_plain(item) for item in cast("list[Any]", value)]
        return _NOTHING if any(item is _NOTHING for item in items) else type(value)(items)
    plain = value is None or isinstance(value, str | int | float | bool | bytes | complex | torch.dtype)
    return value if plain else _NOTHING
