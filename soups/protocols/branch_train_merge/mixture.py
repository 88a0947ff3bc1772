"""The weights of experts on a text, and the loss of their mixture."""

from __future__ import annotations

import torch
from torch import Tensor


def domain_posterior(log_likelihoods: Tensor, decay: float) -> Tensor:
    """Return the experts' weights, float64 (experts,): a moving average of their posteriors over samples that come one by one.

    w ← (1 − decay) w + decay · p(expert | sample),  p ∝ w · p(sample | expert),  from uniform weights on.

    Args:
        log_likelihoods: float64 (experts, samples), of whole samples, in nats.
        decay: weight of a new sample.

    >>> domain_posterior(torch.tensor([[0.0, 0.0], [-99.0, -99.0]]).double(), 0.5)
    tensor([0.8750, 0.1250], dtype=torch.float64)
    """
    weights = torch.full((len(log_likelihoods),), 1 / len(log_likelihoods), dtype=torch.float64)
    for sample in log_likelihoods.unbind(1):
        posterior = (weights.log() + sample.double()).softmax(0)
        weights = (1 - decay) * weights + decay * posterior
    return weights / weights.sum()


def mixture_loss(log_likelihoods: Tensor, weights: Tensor) -> float:
    """Return the mean loss in nats a character of the mixture Σ w_j p_j.

    Args:
        log_likelihoods: float64 (experts, ...), of each character.
        weights: (experts,).
    """
    shaped = weights.double().log().reshape(-1, *[1] * (log_likelihoods.ndim - 1))
    return -float((log_likelihoods + shaped).logsumexp(0).mean())
