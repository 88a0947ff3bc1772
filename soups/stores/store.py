"""`Store`: the interface through which the package reads every checkpoint, lazily: names, then shapes, then slices of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from soups.errors import WeightsError, did_you_mean
from soups.stores.sources import ByteSource, FileRow


class TensorMeta(NamedTuple):
    """A tensor's shape and dtype, from the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes of the tensor's elements."""
        return self.dtype.itemsize * self.numel


class Store(ABC):
    """A checkpoint as lazily read tensors. Open it in a `with` block, or call `close`.

    `location` is the checkpoint's path or URL, for messages. `metadata` is the file's own metadata, text to text. A read needs
    memory only for the requested slice. Any thread may read.
    """

    location: str
    metadata: Mapping[str, str] = {}
    unreadable: Mapping[str, str] = {}
    """Tensors of unsupported dtypes, by name, with the dtype. Reading one is an error that names its dtype."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return the names of all tensors, in the file's order."""

    @abstractmethod
    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor, from the header alone."""

    @abstractmethod
    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of a tensor in row-major order, on the CPU.

        Args:
            key: the tensor's name.
            start: the first element.
            stop: one past the last element; the tensor's end when `None`.
            out: a flat tensor; its memory may hold the result if its dtype and size fit.
        """

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or `tensor[rows]` along its first axis, on the CPU."""
        shape = self.meta(key).shape
        if rows is None:
            return self.read_flat(key).reshape(shape)
        if not shape:
            raise IndexError(f"{key!r} is a scalar and has no rows")
        first, last, step = rows.indices(shape[0])
        if step != 1:
            return self.read(key)[rows]
        last = max(first, last)
        width = torch.Size(shape[1:]).numel()
        return self.read_flat(key, first * width, last * width).reshape(last - first, *shape[1:])

    def declared_dtype(self, key: str) -> torch.dtype:
        """Return the default dtype of an output for this tensor: the stored dtype, unless the store changes it while reading."""
        return self.meta(key).dtype

    def tied(self) -> dict[str, str]:
        """Map each name that repeats another tensor's memory to the first name that holds it."""
        return {}

    def identity(self, key: str) -> str | None:
        """Return text that changes when the tensor's file changes; `None` if only the contents could show a change."""
        return None

    def file_row(self, key: str, start: int) -> FileRow | None:
        """Return the location of a tensor's elements from `start` on in a local file; `None` if they are not contiguous there."""
        return None

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Announce a read of elements `start:stop` of a tensor. The store may read ahead."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def load(self) -> dict[str, Tensor]:
        """Read every tensor into memory; tied names share one tensor."""
        tied = self.tied()
        weights = {key: self.read(key) for key in self.keys() if key not in tied}
        return {key: weights[tied.get(key, key)] for key in self.keys()}

    def absent(self, key: str) -> WeightsError:
        """Return the error for a name that the store does not have."""
        return WeightsError(f"{self.location} has no tensor {key!r}; {did_you_mean(key, self.keys()[:1000])}"[:1500])


def headers(store: Store, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return tensors on the meta device, for comparison by name, shape and dtype; all of them or some."""
    keys = store.keys() if names is None else names
    return {key: torch.empty(store.meta(key).shape, dtype=store.meta(key).dtype, device="meta") for key in keys}


class Extent(NamedTuple):
    """The location of a tensor's elements in a file, contiguous and row-major."""

    source: ByteSource
    offset: int
    meta: TensorMeta


class ExtentStore(Store):
    """A store in which each tensor is one contiguous run of bytes in a file."""

    def __init__(
        self,
        extents: Mapping[str, Extent],
        tied: Mapping[str, str] | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> None:
        self._extents = dict(extents)
        self._tied = dict(tied or {})
        self.unreadable = dict(unreadable or {})

    def keys(self) -> list[str]:
        """Return the names of all tensors, including tied and unreadable tensors."""
        return [*self._extents, *(name for name in self._tied if name not in self._extents), *self.unreadable]

    def extent(self, key: str) -> Extent:
        """Return the location of a tensor's elements."""
        found = self._extents.get(self._tied.get(key, key))
        if found is None and key in self.unreadable:
            raise WeightsError(
                f"{self.location}: tensor {key!r} is {self.unreadable[key]}, and torch has no numbers of this dtype. The other "
                f"tensors of the file can be read; convert this one with the program that wrote it."
            )
        if found is None:
            raise self.absent(key)
        return found

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of a tensor, from the header."""
        return self.extent(key).meta

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of a tensor, read from their offset in the file."""
        source, offset, meta = self.extent(key)
        stop = meta.numel if stop is None else stop
        return source.read_tensor(offset + start * meta.dtype.itemsize, meta.dtype, stop - start, out)

    def identity(self, key: str) -> str | None:
        """Return the file's path, size and modification time, and the tensor's offset."""
        source, offset, _ = self.extent(key)
        return f"{source.identity}@{offset}"

    def file_row(self, key: str, start: int) -> FileRow | None:
        """Return the location of a tensor's elements from `start` on."""
        source, offset, meta = self.extent(key)
        if source.descriptor is None or self._tied.get(key, key) in self.indirect:
            return None
        return FileRow(source, offset + start * meta.dtype.itemsize, meta.dtype)

    @property
    def indirect(self) -> Collection[str]:
        """Names of tensors with other bytes in the file: in another order, or with another sign."""
        return ()

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Ask the system to read ahead."""
        source, offset, meta = self.extent(key)
        source.will_need(offset + start * meta.dtype.itemsize, (stop - start) * meta.dtype.itemsize)

    def tied(self) -> dict[str, str]:
        """Map each tied name to the name it repeats."""
        return dict(self._tied)

    def close(self) -> None:
        """Close the files."""
        for source in {id(extent.source): extent.source for extent in self._extents.values()}.values():
            source.close()
