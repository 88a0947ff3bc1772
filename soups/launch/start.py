"""The shared start: pretrained weights, a linear-probed head, the first epochs that all have in common; made once a pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from soups.evaluation import Batch, predict, score
from soups.fitting.spec import FitSpec, ProbeSpec, fingerprint
from soups.launch.settings import (
    Settings,
    build_network,
    build_splits,
    fit_of,
    open_pool,
    shared_settings,
    versions,
)
from soups.launch.training import train
from soups.stores.pool import Ingredient
from soups.tasks.data import OrderedBatches, Samples, Splits
from soups.tasks.network import Network
from soups.tasks.probe import linear_probe


def evaluation_batches(settings: Settings, samples: Samples, network: Network) -> list[Batch]:
    """Return a split as a list of evaluation batches, kept in memory for repeated use."""
    loader = settings["loader"]
    dataset = network.input.dataset(samples, int(loader["size"]))
    sampler = OrderedBatches(len(samples), int(loader["eval_batch_size"]))
    return list(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=int(loader["workers"])))


def device_for(settings: Settings) -> torch.device:
    """Return the first device that the trainer's settings allow."""
    accelerator = str(settings["trainer"]["accelerator"])
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def ensure_start(settings: Settings, splits: Splits | None = None) -> tuple[Ingredient, dict[str, Tensor]]:
    """Return the shared start of these settings from the pool, making it first if it is not there.

    It is the linear probe (`ensure_probe`), fine-tuned for `start.epochs` epochs that all ingredients have in common:
    runs that share their first steps end in one basin, where averaging works (arXiv:1912.05671). The shared epochs run
    on one device, so that the start has the same bits on any number of them.

    Raises:
        soups.errors.SoupError: data or pretrained weights cannot be had, or the pool cannot be written.
    """
    splits = splits or build_splits(settings)
    probe, weights = ensure_probe(settings, splits)
    if not settings["start"]["epochs"]:
        return probe, weights
    shared = shared_settings(settings)
    determined = fit_of(settings).on(split=probe.split).shared_epochs(probe.weights)

    def make() -> tuple[Ingredient, dict[str, Tensor]]:
        began = time.perf_counter()
        network, _ = train(shared, splits, weights, show_progress=False)
        return _record(settings, splits, network, determined, began, {"linear_probe": probe.fingerprint})

    epochs = settings["start"]["epochs"]
    return _once(settings, determined, f"Fine-tuning the start for the {epochs} epochs that all share", make)


def ensure_probe(settings: Settings, splits: Splits) -> tuple[Ingredient, dict[str, Tensor]]:
    """Return the pretrained network with a linear-probed head, from the pool or made now.

    With `start.probe=false` the head is random, by `start.seed`.
    """
    determined = fit_of(settings).on(split=splits.hash()).probe()

    def make() -> tuple[Ingredient, dict[str, Tensor]]:
        began = time.perf_counter()
        network = build_network(settings, len(splits.classes))
        notes: dict[str, float] = {}
        if settings["start"]["probe"]:
            batches = [evaluation_batches(settings, samples, network) for samples in (splits.train, splits.heldout)]
            probe = linear_probe(network, batches[0], batches[1], len(splits.classes), device_for(settings))
            notes = {"inverse_l2": probe.strength}
        return _record(settings, splits, network, determined, began, notes)

    return _once(settings, determined, "Fitting the linear probe that all ingredients start from", make)


def _once(
    settings: Settings,
    determined: FitSpec | ProbeSpec,
    doing: str,
    make: Callable[[], tuple[Ingredient, dict[str, Tensor]]],
) -> tuple[Ingredient, dict[str, Tensor]]:
    """Return a start by its determinants; let one process of this machine make it if there is none."""
    pool = open_pool(settings)
    name = fingerprint(determined)
    if found := pool.start(name):
        return found
    pool.check_writable()
    with pool.lock(f"start-{name[:16]}"):
        if found := pool.start(name):
            return found
        with Console(stderr=True).status(f"{doing} …"):
            record, weights = make()
        added = pool.add_start(record, weights)
    result = pool.start(added.fingerprint)
    assert result is not None
    return result


def _record(
    settings: Settings,
    splits: Splits,
    network: Network,
    determined: FitSpec | ProbeSpec,
    began: float,
    notes: dict[str, Any],
) -> tuple[Ingredient, dict[str, Tensor]]:
    device = device_for(settings)
    logits = predict(network.module.to(device), evaluation_batches(settings, splits.heldout, network), device)
    numbers = score(logits, splits.heldout.labels)
    weights = {key: tensor.detach().cpu() for key, tensor in network.module.state_dict().items()}
    record = Ingredient(
        fingerprint=fingerprint(determined),
        determinants=determined.determinants(),
        config=settings,
        split=splits.hash(),
        metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
        durations={"total": time.perf_counter() - began},
        versions=versions(),
        notes=notes,
    )
    return record, weights
