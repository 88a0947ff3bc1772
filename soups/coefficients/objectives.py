"""What coefficients are fitted to: a score of the mixed weights, or a loss with its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from soups.evaluation.gradients import Slope
from soups.weights import Weights


class LossGradient(NamedTuple):
    """A loss on one batch and its derivatives.

    Attributes:
        loss: the value.
        by_tensor: the gradient by each mixed tensor; a tied one under one of its names.
        by_parameter: the gradient by each of the objective's own parameters.
    """

    loss: float
    by_tensor: Mapping[str, Tensor]
    by_parameter: Mapping[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """A loss over batches, with its gradient; smaller is better.

    Attributes:
        batches: how many batches there are.
        parameters: what is fitted along with the coefficients (a temperature, heads): leaf tensors by name.
    """

    @property
    def batches(self) -> int:
        """How many batches there are."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Leaf tensors that are fitted along with the coefficients."""
        ...

    def gradient(self, weights: Weights, batch: int) -> LossGradient:
        """Return the loss of some weights on batch number `batch`, and its derivatives."""
        ...


class CrossEntropyGradient(Protocol):
    """The mean cross-entropy of β times the logits on one batch; `soups.evaluation.HeldoutGradient` is one."""

    @property
    def batches(self) -> int:
        """How many batches there are."""
        ...

    def __call__(self, weights: Weights, batch: int, beta: float) -> Slope:
        """Return the loss and its derivatives."""
        ...


class TemperedCrossEntropy:
    """The cross-entropy of β times the logits, with β fitted too: the objective of the learned soup.

    Args:
        source: computes the loss and its derivatives.
        fit_beta: fit β, from 1; else it stays 1.
    """

    def __init__(self, source: CrossEntropyGradient, fit_beta: bool = True) -> None:
        self.source = source
        self.beta = torch.ones((), dtype=torch.float64, requires_grad=True)
        self._fit_beta = fit_beta

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return self.source.batches

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """β, if it is fitted."""
        return {"beta": self.beta} if self._fit_beta else {}

    def gradient(self, weights: Weights, batch: int) -> LossGradient:
        """Return the loss on one batch, and its derivatives by the mixed tensors and β."""
        slope = self.source(weights, batch, float(self.beta.detach()))
        return LossGradient(slope.loss, slope.by_tensor, {"beta": torch.tensor(slope.by_beta, dtype=torch.float64)})
