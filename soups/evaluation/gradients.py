"""Derivatives of a network's held-out loss by its weights, for recipes that descend it or weigh by it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import functional

from soups.errors import ConfigError
from soups.evaluation.scores import Batch, Inputs, forward, ranks
from soups.weights import Weights


class Slope(NamedTuple):
    """A loss and its derivatives.

    Attributes:
        loss: of a batch, in nats.
        by_tensor: the gradient by each trainable tensor, a tied one under one of its names; BatchNorm's statistics have none.
        by_beta: the derivative by the factor on the logits.
    """

    loss: float
    by_tensor: Mapping[str, Tensor]
    by_beta: float


class HeldoutGradient:
    """Mean cross-entropy of a network on one batch, and its derivatives, in evaluation mode.

    Called with (weights, batch number, β) it loads the weights, and returns the loss of β times the logits with its
    derivatives by β and by every tensor that has a gradient, in the network's dtype. Under `torch.distributed` the ranks
    share the batch, and all return the sum.

    Args:
        module: the network; its weights are overwritten by each call.
        batches: the same on every rank.
        device: where the module is.
    """

    def __init__(self, module: nn.Module, batches: Sequence[Batch], device: torch.device | str = "cpu") -> None:
        self.module, self.data, self.device = module, batches, device

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self.data)

    def __call__(self, weights: Weights, batch: int, beta: float) -> Slope:
        """Return loss and derivatives of `weights` on batch number `batch`."""
        rank, world = ranks()
        inputs, labels = self.data[batch]
        whole = len(labels)
        inputs, labels = _rows(inputs, slice(rank, None, world)), labels[rank::world].to(self.device)
        self.module.load_state_dict(weights)
        names, parameters = zip(*_trainable(self.module), strict=True)
        factor = torch.tensor(beta, dtype=parameters[0].dtype, device=self.device, requires_grad=True)
        with _evaluating(self.module):
            if len(labels):
                logits = forward(self.module, inputs, self.device)
                loss = functional.cross_entropy(factor * logits, labels, reduction="sum") / whole
                *gradients, by_beta = torch.autograd.grad(loss, [*parameters, factor], materialize_grads=True)
            else:
                loss, by_beta = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
                gradients = [torch.zeros_like(parameter) for parameter in parameters]
        found = dict(zip(names, gradients, strict=True))
        numbers = torch.stack([loss.detach().to(factor.dtype), by_beta.detach().to(factor.dtype)])
        if world > 1:
            for value in (*found.values(), numbers):
                distributed.all_reduce(value)
        return Slope(float(numbers[0]), found, float(numbers[1]))


def diagonal_fisher(
    module: nn.Module,
    weights: Weights,
    batches: Sequence[Batch],
    device: torch.device | str = "cpu",
    samples: int = 256,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information with predicted labels: the mean of squared gradients, sample by sample.

    The gradient is of the log-probability of the class that the model itself predicts, so no labels are used; BCWI's
    code (arXiv:2301.10546) does the same. One backward pass a sample.

    Args:
        module: the network; its weights are overwritten.
        weights: where the information is measured.
        batches: inputs in their order.
        device: where the module is.
        samples: at most so many, the first ones.

    Raises:
        ConfigError: no samples.
    """
    module.load_state_dict(weights)
    names, parameters = zip(*_trainable(module), strict=True)
    sums = [torch.zeros_like(parameter, dtype=torch.float32, device="cpu") for parameter in parameters]
    seen = 0
    with _evaluating(module):
        for inputs, labels in batches:
            for number in range(min(len(labels), samples - seen)):
                logits = forward(module, _rows(inputs, slice(number, number + 1)), device)
                loss = functional.cross_entropy(logits, logits.argmax(dim=1))
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                for total, value in zip(sums, gradients, strict=True):
                    total.add_(value.detach().float().square().cpu())
                seen += 1
    if not seen:
        raise ConfigError(f"The Fisher information needs samples; {samples} were asked for.")
    return {name: total / seen for name, total in zip(names, sums, strict=True)}


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return floating parameters by name, tied ones once; they are made to want gradients."""
    found = [(name, parameter) for name, parameter in module.named_parameters() if parameter.is_floating_point()]
    for _, parameter in found:
        parameter.requires_grad_(True)
    return found


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Within the block the module is in evaluation mode, with gradients."""
    was_training = module.training
    module.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        module.train(was_training)


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    """Return some samples of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    return {name: value[rows] for name, value in inputs.items()}
