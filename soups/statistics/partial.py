"""Sums so far, in a file, so that a collection that was interrupted goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soups.errors import StorageError
from soups.statistics.sums import Sums
from soups.stores import SafetensorsStore, write_safetensors
from soups.stores.files import fingerprint

_SECONDS = 30.0
"""Between two states."""


class Partial:
    """The state of a collection, in a file beside others of the same name for each rank.

    Args:
        path: of the file; None keeps nothing.
        rank: of this process.
        settings: everything that decides the sums; the state of another collection is refused.
    """

    def __init__(self, path: Path | None, rank: int, settings: Sequence[Any]) -> None:
        self.path = None if path is None else path.with_name(f"{path.name}.{rank}.partial")
        self.fingerprint = fingerprint(list(settings))
        self._kept = time.monotonic()

    def restore(self, sums: Sums) -> int:
        """Read the sums so far; return how many groups they are of, 0 where there are none.

        Raises:
            StorageError: the state is of another collection.
        """
        if self.path is None or not self.path.exists():
            return 0
        with SafetensorsStore(self.path) as store:
            header = json.loads(store.metadata.get("partial", "{}"))
            if header.get("fingerprint") != self.fingerprint:
                raise StorageError(
                    f"{self.path} is the unfinished collection of another model, or with other settings. Remove it to start anew."
                )
            sums.tensors = {name: tensor.clone() for name, tensor in store.load().items()}
        sums.rows, sums.aliases = dict(header["rows"]), dict(header["aliases"])
        return int(header["groups"])

    def keep(self, sums: Sums, groups: int) -> None:
        """Write the sums so far, if some time has passed."""
        if self.path is None or time.monotonic() - self._kept < _SECONDS:
            return
        self._kept = time.monotonic()
        header = {
            "fingerprint": self.fingerprint,
            "groups": groups,
            "rows": sums.rows,
            "aliases": sums.aliases,
        }
        write_safetensors(self.path, sums.tensors, {"partial": json.dumps(header)})

    def remove(self) -> None:
        """Remove the file, when the collection is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
