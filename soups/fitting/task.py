"""Data and networks from their sections, and batches to evaluate on."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from soups.errors import ConfigError
from soups.evaluation import Batch
from soups.fitting.configuration import LoaderLayout
from soups.fitting.schema import Target, build
from soups.tasks.data import OrderedBatches, Samples, Splits
from soups.tasks.network import Network


def build_splits(data: Target) -> Splits:
    """Build a `data` section.

    Raises:
        ConfigError: the target cannot be called, or makes something else.
        soups.errors.DataError: the data cannot be read.
    """
    splits = build(data, "data")
    if not isinstance(splits, Splits):
        raise ConfigError(f"data._target_={data.get('_target_')} must return soups.tasks.data.Splits.")
    return splits


def build_network(
    model: Target, num_classes: int, seed: int, channels_last: bool = False, pretrained: bool = True
) -> Network:
    """Build a `model` section.

    Args:
        model: the section.
        num_classes: width of the head.
        seed: of what is random in a new network (its head, or all of it without pretrained weights).
        channels_last: keep the weights of convolutions in this memory format.
        pretrained: false where the weights are loaded afterwards: those of the section are not read then.

    Raises:
        ConfigError: the target cannot be called, or makes something else.
        soups.errors.DataError: pretrained weights cannot be had.
    """
    section = model if pretrained else {**model, "pretrained": False}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build(section, "model", num_classes=num_classes)
    if not isinstance(network, Network):
        raise ConfigError(f"model._target_={model.get('_target_')} must return soups.tasks.network.Network.")
    if channels_last:
        network.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


def evaluation_batches(samples: Samples, network: Network, size: int, loader: LoaderLayout) -> list[Batch]:
    """Return a split as a list of evaluation batches, kept in memory for repeated use.

    Args:
        samples: the split.
        network: that reads them.
        size: of its input, `loader.size`.
        loader: batch size and workers.
    """
    dataset = network.input.dataset(samples, size)
    sampler = OrderedBatches(len(samples), loader.eval_batch_size)
    return list(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=loader.workers))
