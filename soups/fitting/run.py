"""The context of a run, built once and when it is asked for: splits, network, linear probe, base model, pool."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch

from soups.errors import ConfigError
from soups.fitting.base_model import SharedModel, ensure_base_model, ensure_probe
from soups.fitting.configuration import Configuration, Layout
from soups.fitting.environment import device_for
from soups.fitting.spec import FitSpec
from soups.fitting.task import build_network, build_splits
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.network import Network


@dataclass(frozen=True, eq=False)
class Run:
    """What the settings of one fit, or of a soup, stand for; each part is made when it is first asked for, and kept.

    Attributes:
        configuration: all settings.
        shared: a run whose parts are taken where the settings that decide them are the same.
    """

    configuration: Configuration
    shared: Run | None = None

    @cached_property
    def layout(self) -> Layout:
        """Where the run happens."""
        return self.configuration.layout

    @cached_property
    def asked(self) -> FitSpec:
        """The fit by its settings alone: nothing is read or computed for it."""
        return self.configuration.fit

    @cached_property
    def on_data(self) -> FitSpec:
        """The fit, its data by content."""
        return self.asked.on(split=self.split)

    @cached_property
    def spec(self) -> FitSpec:
        """The fit, its data and base model by content: what its fingerprint is made of."""
        return self.on_data.on(base_model=self.base_model.record.weights)

    @cached_property
    def device(self) -> torch.device:
        """The first device that the settings allow."""
        return device_for(self.layout.devices)

    @cached_property
    def pool(self) -> Pool:
        """The pool of ingredients.

        Raises:
            ConfigError: the settings name checkpoints made elsewhere, which are no pool of ours.
        """
        section = self.layout.pool
        if section.format is not None or not isinstance(section.path, str):
            raise ConfigError(f"pool.path={section.path} must be a folder or URL of ingredients (pool=local).")
        if self.shared is not None and self.shared.layout.pool == section:
            return self.shared.pool
        return Pool(section.path)

    @cached_property
    def splits(self) -> Splits:
        """The data."""
        if self.shared is not None and self.shared.asked.data == self.asked.data:
            return self.shared.splits
        return build_splits(self.asked.data)

    @cached_property
    def split(self) -> str:
        """Hash of the splits."""
        same = self.shared is not None and self.shared.asked.data == self.asked.data
        return self.shared.split if same and self.shared is not None else self.splits.hash()

    @cached_property
    def network(self) -> Network:
        """A network of the settings' architecture; its weights are meaningless and may be replaced by anybody."""
        if self.shared is not None and self._same_network(self.shared):
            return self.shared.network
        task, start = self.asked.task, self.asked.start
        seed = start.seed if start else 0
        return build_network(self.asked.model, len(self.splits.classes), seed, task.channels_last, pretrained=False)

    def _same_network(self, other: Run) -> bool:
        mine, theirs = self.asked, other.asked
        return (mine.model, mine.data, mine.start, mine.task.channels_last) == (
            theirs.model, theirs.data, theirs.start, theirs.task.channels_last,
        )  # fmt: skip

    @cached_property
    def probe(self) -> SharedModel:
        """The pretrained network with a linear-probed head; made and kept in the pool if it is not there."""
        if self.shared is not None and self._same_pool() and self.shared.on_data.probe() == self.on_data.probe():
            return self.shared.probe
        return ensure_probe(self.on_data, self.layout, self.pool, self.splits)

    @cached_property
    def base_model(self) -> SharedModel:
        """The model that all ingredients start from; made and kept in the pool if it is not there."""
        if not (start := self.asked.start) or not start.epochs:
            return self.probe
        if self.shared is not None and self._same_pool() and self._same_shared_epochs(self.shared):
            return self.shared.base_model
        return ensure_base_model(self.on_data, self.layout, self.pool, self.splits, self.probe)

    def shares_base_model(self, other: Run) -> bool:
        """Tell whether the ingredients of two runs start from one model and learn from the same data."""
        if self.split != other.split or self.on_data.probe() != other.on_data.probe():
            return False
        starts = self.asked.start, other.asked.start
        if any(start is None or start.epochs == 0 for start in starts):
            return starts[0] == starts[1] or not any(start and start.epochs for start in starts)
        return self._same_shared_epochs(other)

    def _same_pool(self) -> bool:
        return self.shared is not None and self.shared.layout.pool == self.layout.pool

    def _same_shared_epochs(self, other: Run) -> bool:
        return self.on_data.shared_epochs("") == other.on_data.shared_epochs("")


_current: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def shared(run: Run) -> Generator[None]:
    """Within the block, runs of this process take what they have in common with `run` from it."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def run_of(configuration: Configuration) -> Run:
    """Return the run of some settings, on the parts of the run around it where there is one."""
    return Run(configuration, _current.get())
