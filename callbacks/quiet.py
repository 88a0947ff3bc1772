"""Run a module's own steps a second time without anyone noticing: its logging, its metrics and the random state."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextlib.contextmanager
def replaced(target: Any, **attributes: Any) -> Generator[None]:
    """Set instance attributes within the block; what was there before comes back, absence included."""
    before = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(target, name, before[name])
            else:
                object.__delattr__(target, name)


class SpareMetrics:
    """A second set of states for the torchmetrics objects of a module, so that an extra run leaves the first alone."""

    def __init__(self) -> None:
        self._spare: dict[int, dict[str, Any]] = {}

    @contextlib.contextmanager
    def in_use(self, module: pl.LightningModule) -> Generator[None]:
        """Within the block the metrics count into the spare states, which are kept from block to block."""
        from torchmetrics import Metric

        metrics: list[Any] = [layer for layer in module.modules() if isinstance(layer, Metric)]
        own = [_take(metric) for metric in metrics]
        for metric in metrics:
            metric.__dict__.update(self._spare.get(id(metric)) or _fresh(metric))
        try:
            yield
        finally:
            for metric, state in zip(metrics, own, strict=True):
                self._spare[id(metric)] = _take(metric)
                metric.__dict__.update(state)


# What torchmetrics keeps of a metric's progress beside the states that `add_state` declared.
_PROGRESS = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")


def _take(metric: Any) -> dict[str, Any]:
    return {name: metric.__dict__[name] for name in (*metric._defaults, *_PROGRESS) if name in metric.__dict__}


def _fresh(metric: Any) -> dict[str, Any]:
    """Return the states of a metric that has seen nothing, in memory of their own."""
    states = {
        name: default.detach().clone().to(metric.device) if isinstance(default, torch.Tensor) else []
        for name, default in metric._defaults.items()
    }
    progress = {"_update_count": 0, "_computed": None, "_forward_cache": None, "_cache": None, "_is_synced": False}
    return states | {name: value for name, value in progress.items() if name in metric.__dict__}


@contextlib.contextmanager
def silent(module: pl.LightningModule) -> Generator[None]:
    """Within the block the module logs nothing, counts into no metric, and draws no random numbers of the run."""

    def ignore(*_: Any, **__: Any) -> None:
        return None

    with isolate_rng(), SpareMetrics().in_use(module), replaced(module, log=ignore, log_dict=ignore):
        yield


@contextlib.contextmanager
def logging_as(module: pl.LightningModule, suffix: str) -> Generator[None]:
    """Within the block every metric is logged under its name with `suffix` added."""
    log = module.log

    def renamed(name: str, *args: Any, **kwargs: Any) -> None:
        log(f"{name}{suffix}", *args, **kwargs)

    def renamed_all(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        # A MetricCollection names its own metrics: log its members one by one.
        for name, value in dictionary.items():
            renamed(name, value, *args, **kwargs)

    with replaced(module, log=renamed, log_dict=renamed_all):
        yield
