"""What all ingredients start from: pretrained weights with a linear-probed head, then epochs that all have in common.

Both are made once a pool. Runs that share their first steps end in one basin, where averaging works (arXiv:1912.05671).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from torch import Tensor

from soups.evaluation import predict, score
from soups.fitting.configuration import Layout
from soups.fitting.environment import device_for, versions
from soups.fitting.spec import FitSpec, ProbeSpec, fingerprint
from soups.fitting.task import build_network, evaluation_batches
from soups.fitting.training import train
from soups.stores.pool import Ingredient, Pool
from soups.tasks.data import Splits
from soups.tasks.network import Network
from soups.tasks.probe import linear_probe


@dataclass(frozen=True, eq=False)
class SharedModel:
    """A model that ingredients share: the linear probe, or the base model.

    Attributes:
        record: of the pool.
        pool: that keeps it.
    """

    record: Ingredient
    pool: Pool

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Its weights, read once."""
        found = self.pool.start(self.record.fingerprint)
        assert found is not None
        return found[1]


def ensure_probe(spec: FitSpec, layout: Layout, pool: Pool, splits: Splits) -> SharedModel:
    """Return the pretrained network with a linear-probed head, from the pool or made now.

    With `start.probe=false` the head is random, by `start.seed`.

    Args:
        spec: of the fits to come, its data by content.
        layout: where it runs.
        pool: that keeps it.
        splits: of the spec's data.

    Raises:
        soups.errors.SoupError: pretrained weights cannot be had, or the pool cannot be written.
    """
    probe = spec.probe()

    def make() -> tuple[Network, dict[str, Any]]:
        classes = len(splits.classes)
        network = build_network(spec.model, classes, probe.seed, spec.task.channels_last)
        if not probe.probe:
            return network, {}
        batches = [
            evaluation_batches(part, network, probe.size, layout.loader) for part in (splits.train, splits.heldout)
        ]
        found = linear_probe(network, batches[0], batches[1], classes, device_for(layout.devices))
        return network, {"inverse_l2": found.strength}

    kept = _Kept(spec, layout, pool, splits)
    return kept.once(probe, "Fitting the linear probe that all ingredients start from", make)


def ensure_base_model(spec: FitSpec, layout: Layout, pool: Pool, splits: Splits, probe: SharedModel) -> SharedModel:
    """Return the linear probe fine-tuned for `start.epochs` epochs, from the pool or made now.

    The shared epochs run on one device, so that the base model has the same bits on any number of them.

    Args:
        spec, layout, pool, splits: as for `ensure_probe`.
        probe: the linear probe.

    Raises:
        soups.errors.SoupError: the pool cannot be written.
    """
    fit = spec.shared_epochs(probe.record.weights)
    epochs = fit.trainer.max_epochs

    def make() -> tuple[Network, dict[str, Any]]:
        here = layout.on_one_device().with_(validation={"check_val_every_n_epoch": epochs})
        network, _ = train(fit, here, probe.weights, splits)
        return network, {"linear_probe": probe.record.fingerprint}

    kept = _Kept(spec, layout, pool, splits)
    return kept.once(fit, f"Fine-tuning the base model for the {epochs} epochs that all share", make)


@dataclass(frozen=True)
class _Kept:
    """Shared models of a pool; see `once`."""

    spec: FitSpec
    layout: Layout
    pool: Pool
    splits: Splits

    def once(
        self, determined: FitSpec | ProbeSpec, doing: str, make: Callable[[], tuple[Network, Mapping[str, Any]]]
    ) -> SharedModel:
        """Return a shared model by what decides it; one process of this machine makes it if there is none."""
        pool, name = self.pool, fingerprint(determined)
        if found := pool.start_record(name):
            return SharedModel(found, pool)
        pool.check_writable()
        with pool.lock(f"start-{name[:16]}"):
            if found := pool.start_record(name):
                return SharedModel(found, pool)
            with Console(stderr=True).status(f"{doing} …"):
                began = time.perf_counter()
                network, notes = make()
                record = self._record(determined, network, began, dict(notes))
            weights = {key: tensor.detach().cpu() for key, tensor in network.module.state_dict().items()}
            return SharedModel(pool.add_start(record, weights), pool)

    def _record(
        self, determined: FitSpec | ProbeSpec, network: Network, began: float, notes: dict[str, Any]
    ) -> Ingredient:
        device, heldout = device_for(self.layout.devices), self.splits.heldout
        batches = evaluation_batches(heldout, network, self.spec.loader.size, self.layout.loader)
        numbers = score(predict(network.module.to(device), batches, device), heldout.labels)
        return Ingredient(
            fingerprint=fingerprint(determined),
            determinants=determined.determinants(),
            config=self.spec.plain(),
            split=self.splits.hash(),
            metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
            durations={"total": time.perf_counter() - began},
            versions=versions(),
            notes=notes,
        )
