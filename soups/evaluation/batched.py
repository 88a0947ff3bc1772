"""Predictions of several models in one pass: their weights are stacked and the network is mapped over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from soups.errors import ConfigError
from soups.evaluation.scores import Batch, Inputs, predict
from soups.weights import Weights, check_same


class _Stacked(nn.Module):
    """Maps inputs to logits (B, models, classes)."""

    def __init__(self, module: nn.Module, stacked: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.stacked = dict(stacked)

    def forward(self, inputs: Inputs | None = None, **named: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor]) -> Tensor:
            output = functional_call(self.module, weights, () if inputs is None else (inputs,), named)
            return cast(Tensor, getattr(output, "logits", output))

        return vmap(one)(self.stacked).movedim(0, 1)


def predict_many(
    module: nn.Module, models: Sequence[Weights], batches: Sequence[Batch], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the logits of several models, float32 (models, N, classes), as `predict` does those of one.

    All models are in memory, and the activations of all for one batch. It pays where the work of a layer is small against
    the cost of starting it: on a CPU for small perceptrons, not for convolutions or transformers, which take longer than
    one model after the other (`python -m benchmarks.racing` measures it). On a GPU, measure before use.

    Args:
        module: the network; its own weights are not touched.
        models: of one architecture.
        batches: as for `predict`; under `torch.distributed` the ranks share them.
        device: where the module is.

    Raises:
        ConfigError: no models.
        soups.errors.WeightsError: models that do not fit each other.
    """
    if not models:
        raise ConfigError("Predictions of no models were asked for.")
    for number, weights in enumerate(models[1:], 1):
        check_same(models[0], weights, where=f"model number {number}")
    stacked = {name: torch.stack([weights[name] for weights in models]).to(device) for name in models[0]}
    return predict(_Stacked(module, stacked), batches, device).movedim(1, 0)
