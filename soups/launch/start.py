"""The shared start: pretrained weights with a linear-probed head, made once for a pool."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from soups.evaluation import predict, score
from soups.launch.settings import (
    Settings,
    build_network,
    build_splits,
    name_of,
    open_pool,
    start_determinants,
    versions,
)
from soups.stores.pool import Ingredient
from soups.tasks.images import Batches, Images, OrderedBatches, Splits
from soups.tasks.models import Network
from soups.tasks.probe import linear_probe


def evaluation_batches(settings: Settings, images: Images, network: Network) -> list[tuple[Tensor, Tensor]]:
    """Return a split as a list of evaluation batches, kept in memory for repeated use."""
    loader = settings["loader"]
    dataset = Batches(images, int(loader["size"]), network.mean, network.std)
    sampler = OrderedBatches(len(images), int(loader["eval_batch_size"]))
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

    Raises:
        soups.errors.SoupError: data or pretrained weights cannot be had, or the pool cannot be written.
    """
    pool = open_pool(settings)
    splits = splits or build_splits(settings)
    determined = start_determinants(settings, splits.hash())
    name = name_of(determined)
    if found := pool.start(name):
        return found
    pool.check_writable()
    with pool.lock(f"start-{name[:16]}"):
        if found := pool.start(name):
            return found
        began = time.perf_counter()
        with Console(stderr=True).status("Fitting the linear probe that all ingredients start from …"):
            record = _make(settings, splits, determined, began)
    added = pool.add_start(*record)
    result = pool.start(added.fingerprint)
    assert result is not None
    return result


def _make(
    settings: Settings, splits: Splits, determined: Settings, began: float
) -> tuple[Ingredient, dict[str, Tensor]]:
    network = build_network(settings, len(splits.classes))
    device = device_for(settings)
    notes: dict[str, float] = {}
    heldout = evaluation_batches(settings, splits.heldout, network)
    if settings["start"]["probe"]:
        train = evaluation_batches(settings, splits.train, network)
        probe = linear_probe(network, train, heldout, len(splits.classes), device)
        notes = {"probe_inverse_l2": probe.strength}
    logits = predict(network.module.to(device), heldout, device)
    numbers = score(logits, splits.heldout.labels)
    weights = {key: tensor.detach().cpu() for key, tensor in network.module.state_dict().items()}
    record = Ingredient(
        fingerprint=name_of(determined),
        determinants=determined,
        config=settings,
        split=splits.hash(),
        metrics={"heldout": {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": numbers.count}},
        durations={"total": time.perf_counter() - began},
        versions=versions(),
        notes=notes,
    )
    return record, weights
