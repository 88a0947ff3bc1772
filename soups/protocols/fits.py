"""Fits of a protocol's nodes: following them, and the parts of a model that they leave."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from soups.evaluation import Batch
from soups.fitting import FitSpec, Layout
from soups.fitting.progress import ReportProgress
from soups.fitting.task import build_network, evaluation_batches
from soups.fitting.tracking import tracked
from soups.protocols.execution import Work
from soups.protocols.runner import ProtocolConfiguration
from soups.tasks.data import Samples
from soups.tasks.network import Network


def network_of(spec: FitSpec, classes: int, *, seed: int, pretrained: bool = True) -> Network:
    """Build the network of a fit.

    Args:
        spec: names the model.
        classes: width of the head.
        seed: of weights that are not pretrained; one seed for all fits of a protocol, so that they share their start.
        pretrained: false where the caller loads all weights.
    """
    return build_network(spec.model, classes, seed, spec.task.channels_last, pretrained=pretrained)


def batches_of(spec: FitSpec, layout: Layout, samples: Samples, network: Network) -> list[Batch]:
    """Return a split as evaluation batches of the fit's network."""
    return evaluation_batches(samples, network, spec.loader.size, layout.loader)


def fit_run(
    configuration: ProtocolConfiguration, name: str, title: str, about: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Any | None]:
    """Within the block a fit has a tracked run of its own, in the protocol's group; the block gets its logger.

    Args:
        configuration: all settings; shown beside the run.
        name: fingerprint of the fit's result.
        title: shown in the dashboard.
        about: everything that decides the result.
    """
    return tracked(configuration.layout, name, title, {**configuration.plain(), "determinants": dict(about)})


def node_run(configuration: ProtocolConfiguration, work: Work) -> contextlib.AbstractContextManager[Any | None]:
    """Return the `fit_run` of a node."""
    return fit_run(configuration, work.node.fingerprint, work.node.label, work.node.determinants)


def report_progress(work: Work) -> lightning.Callback:
    """Return the callback that keeps a file of a node's progress."""
    return ReportProgress(work.pool, work.node.fingerprint)


def trained_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights that fits change, copied; the others are the pretrained ones, wherever the model is built."""
    return {
        name: parameter.detach().cpu().clone().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
