"""Safetensors files: a lazily read store, and an atomic writer that keeps tied weights tied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soups.errors import StorageError
from soups.stores.files import replacing
from soups.stores.store import Store, TensorMeta
from soups.weights import Weights, tied_names

# Names that repeat another tensor are left out of the file (the format stores no sharing) and listed under this key.
TIED = "soups.tied"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip


class SafetensorsStore(Store):
    """One `.safetensors` file, mapped into memory and read a slice at a time.

    Raises:
        StorageError: the file is absent, truncated or not in the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.location = str(path)
        if not Path(path).is_file():
            raise StorageError(f"There is no file {path}. Check the path; was the run that makes it finished?")
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise StorageError(
                f"{path} is not a whole safetensors file ({error}). It may have been cut off while it was copied; "
                f"copy or make it again."
            ) from error
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        self._tied: dict[str, str] = json.loads(self.metadata.get(TIED, "{}"))

    def keys(self) -> list[str]:
        """Return the names of all tensors, tied ones included."""
        return [*self._file.keys(), *self._tied]

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor, from the header."""
        part = self._file.get_slice(self._tied.get(key, key))
        return TensorMeta(tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor or some of its rows. Tied names are read from the tensor they repeat."""
        key = self._tied.get(key, key)
        return self._file.get_tensor(key) if rows is None else self._file.get_slice(key)[rows]

    def load(self) -> dict[str, Tensor]:
        """Read every tensor; tied names share one tensor again."""
        weights = {key: self._file.get_tensor(key) for key in self._file.keys()}  # noqa: SIM118
        return weights | {name: weights[first] for name, first in self._tied.items()}

    def close(self) -> None:
        """Unmap the file."""
        self._file.__exit__(None, None, None)


def write_safetensors(path: str | Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights to one safetensors file, atomically. Tied weights are stored once and are tied again when loaded.

    Raises:
        StorageError: the disk is full, read-only or out of reach; an old file at `path` is kept.
    """
    tied = tied_names(weights)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name not in tied}
    # Views of one buffer (slices of a fused weight) are no ties: the format wants them apart.
    owned: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in owned or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        owned.add(tensors[name].untyped_storage().data_ptr())
    notes = dict(metadata or {})
    if tied:
        notes[TIED] = json.dumps(tied)
    with replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **notes})
        except SafetensorError as error:  # the library wraps the operating system's error in its own
            raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> OSError:
    import errno

    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        if f"os error {number}" in text:
            return OSError(number, text)
    return OSError(text)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a whole safetensors file into memory.

    Raises:
        StorageError: the file is absent, truncated or not in the format.
    """
    with SafetensorsStore(path) as store:
        return store.load()
