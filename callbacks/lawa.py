"""Latest weight averaging while training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from soups.averaging import lawa
from soups.averaging.mean import Mean
from soups.averaging.units import RunLength

from .base import Averaging
from .settings import Started, settings_of


class LAWA(Averaging):
    """Keep the equal mean of the last k points (arXiv:2209.14981; Early Weight Averaging, arXiv:2306.03241).

    Args:
        k: points in the window.
        every: spacing of the points: "1ep" as in the first paper, "200st" or more as in the second.
        snapshots: where the ring lives: "device", "cpu" or "disk".
        snapshot_dtype: dtype of the ring; float32 when None.
        folder: where the files of "disk" go; a temporary folder when None.
        **options: see `Settings`. `name` is "lawa" unless given.
    """

    def __init__(
        self,
        k: int = 10,
        every: str = "1ep",
        *,
        snapshots: str = "device",
        snapshot_dtype: str | None = None,
        folder: str | Path | None = None,
        **options: Unpack[Started],
    ) -> None:
        super().__init__(settings_of(options, name="lawa", every=every))
        self.k, self.snapshots, self.snapshot_dtype, self.folder = k, snapshots, snapshot_dtype, folder
        self.make(RunLength(), None)

    @property
    def includes_last(self) -> bool:
        """The last step of the planned run is a point."""
        return True

    def make(self, plan: RunLength, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the average."""
        settings = self.settings
        mean = lawa.LAWA(
            self.k,
            snapshots=self.snapshots,
            snapshot_dtype=self.snapshot_dtype,
            folder=self.folder,
            **settings.keep(covers),
        )
        return {settings.name: mean}
