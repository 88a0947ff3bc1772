"""Torch's files (`.pt`, `.pth`, `.bin`, `.ckpt`), read lazily and without ever running their pickle.

`torch.save` writes a pickle that says how tensors are put together, and the elements of each storage: in the format of torch
1.6 and later as uncompressed entries of a zip archive, before that one after another behind the pickles. `InertUnpickler`
reads the pickle; nothing from the file is imported or called.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import Any, NamedTuple, cast

from torch import Tensor

from soups.errors import StorageError
from soups.stores.inert import HostileError, InertUnpickler, TensorRecord
from soups.stores.sources import ByteSource, open_bytes
from soups.stores.unreadable import recognise

# A pickle larger than this describes no checkpoint; it would only fill the memory.
_MAX_PICKLE = 512 * 2**20
# What a file of torch before 1.6 begins with, pickled.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
# Bytes that tell files apart.
_START = 512


class ZipEntry(NamedTuple):
    """Where a storage's bytes lie in a file, and how many they are."""

    offset: int
    nbytes: int


class TorchArchive:
    """A torch file: its object tree, with a `TensorRecord` in the place of each tensor, and where storages lie.

    Raises:
        StorageError: the file is absent, truncated, compressed, of another kind, or asks to run code.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source: ByteSource = open_bytes(path)
        try:
            start = self.source.read(0, min(_START, self.source.size))
            if start[:2] == b"PK":
                self._entries, data = self._open()
                self.root = InertUnpickler(io.BytesIO(data)).load()
            elif start.startswith(_LEGACY_START):
                self._entries, self.root = self._read_legacy()
            else:
                raise StorageError(
                    recognise(start, self.source.location)
                    or f"{self.source.location} is no file of torch.save. If it was cut off or damaged, copy or make it again."
                )
        except StorageError:
            self.source.close()
            raise
        except HostileError as error:
            self.source.close()
            raise StorageError(
                f"{self.source.location} asks to run {error} when it is loaded. No checkpoint needs that: it was refused and "
                f"nothing was run. Do not load it with other tools; get the weights as safetensors from someone you trust."
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            self.source.close()
            raise StorageError(
                f"{self.source.location} holds a damaged or foreign pickle ({type(error).__name__}: {error}). Copy or make it "
                f"again, or convert it to safetensors."[:1000]
            ) from error

    def _open(self) -> tuple[dict[str, ZipEntry], bytes]:
        where = self.source.location
        try:
            with self.source.open() as file, zipfile.ZipFile(file) as archive:
                entries = {info.filename: info for info in archive.infolist()}
                if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in entries):
                    raise StorageError(
                        f"{where} is a TorchScript program (torch.jit.save). It is not loaded, because that would run its "
                        f"code; where it was made, save `module.state_dict()` instead."
                    )
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

    def _data_offset(self, info: zipfile.ZipInfo) -> ZipEntry:
        # The central directory does not say how long the local header is: torch pads it to align the data.
        local = self.source.read(info.header_offset, 30)
        if local[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no entry where {info.filename!r} should begin")
        name, extra = struct.unpack("<HH", local[26:30])
        begin = info.header_offset + 30 + name + extra
        if begin + info.file_size > self.source.size:
            raise zipfile.BadZipFile(f"entry {info.filename!r} ends past the end of the file")
        return ZipEntry(begin, info.file_size)

    def _read_legacy(self) -> tuple[dict[str, ZipEntry], Any]:
        """Read the four pickles of torch before 1.6 and find the storages behind them."""
        with self.source.open() as file:
            magic, protocol, system = (InertUnpickler(file).load() for _ in range(3))
            if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
                raise StorageError(
                    f"{self.source.location} is of a version of torch.save that is not known ({protocol})."
                )
            if not isinstance(system, dict) or not cast("dict[str, Any]", system).get("little_endian", True):
                raise StorageError(f"{self.source.location} holds numbers in big-endian order, which is not supported.")
            unpickler = InertUnpickler(file)
            root = unpickler.load()
            keys = InertUnpickler(file).load()
            position = file.tell()
        entries: dict[str, ZipEntry] = {}
        for key in cast("list[Any]", keys):
            storage = unpickler.storages.get(str(key))
            if storage is None:
                raise StorageError(
                    f"{self.source.location} holds a storage {key!r} that no tensor names; it is damaged."
                )
            count = int.from_bytes(self.source.read(position, 8), "little")
            nbytes = count * storage.dtype.itemsize
            if position + 8 + nbytes > self.source.size:
                raise StorageError(
                    f"{self.source.location} ends before its storages do. It was cut off while it was copied; copy or make it "
                    f"again."
                )
            entries[str(key)] = ZipEntry(position + 8, nbytes)
            position += 8 + nbytes
        return entries, root

    def place(self, record: TensorRecord) -> int:
        """Return the byte offset of a record's first element in the file.

        Raises:
            StorageError: the storage is absent or shorter than the pickle says.
        """
        found = self._entries.get(record.storage.key)
        needed = (record.storage.begin + record.storage.numel) * record.storage.dtype.itemsize
        if found is None or found.nbytes < needed:
            raise StorageError(
                f"{self.source.location}: storage {record.storage.key!r} is {'absent' if found is None else 'too short'}. "
                f"The file is damaged; copy or make it again."
            )
        return found.offset + record.offset * record.dtype.itemsize

    def read(self, record: TensorRecord) -> Tensor:
        """Read a whole tensor."""
        return record.of(self.source.read_tensor(self.place(record), record.dtype, record.span))

    def close(self) -> None:
        """Close the file."""
        self.source.close()
