"""Mixout: during fine-tuning, weights are randomly put back to those of the pre-trained model.

Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models (arXiv:1909.11299), equation 6:
W = (m θ + (1 - m) θ₀ - p θ₀) / (1 - p) with m ~ Bernoulli(1 - p), whose expected value is θ. In evaluation W = θ.

The published code shares one mask down each input column, and its backward leaves out the 1/(1 - p) of the formula, so that
its gradient is (1 - p) times the true one. Here the gradient is that of the formula.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soups.errors import ConfigError


def mixout(
    weight: Tensor,
    anchor: Tensor,
    p: float,
    *,
    share: str = "column",
    inputs: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mixed weight, through which gradients flow to `weight`.

    Args:
        weight: the parameter being trained, shape (out, in, …) or (n,).
        anchor: the pre-trained value, the same shape; no gradient.
        p: probability with which an element is put back, in [0, 1).
        share: "column": one draw an input column, shared by all outputs (the published code); "element": one each.
        inputs: the dimensions of the weight that run over inputs; all but the first when None.
        generator: where the randomness comes from; torch's own when None.

    >>> theta, start = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
    >>> torch.equal(mixout(theta, start, 0.0), theta)
    True

    Raises:
        ConfigError: p outside [0, 1), or an unknown `share`.
    """
    if not 0 <= p < 1:
        raise ConfigError(f"p={p} must lie in [0, 1); the paper uses 0.7 to 0.9.")
    if share not in ("column", "element"):
        raise ConfigError(f"share={share!r} is none of 'column', 'element'.")
    if p == 0:
        return weight
    if share == "element" or weight.dim() < 2:
        inputs = range(weight.dim())
    elif inputs is None:
        inputs = range(1, weight.dim())
    shape = [size if dimension in inputs else 1 for dimension, size in enumerate(weight.shape)]
    keep = torch.empty(shape, dtype=weight.dtype, device=weight.device).bernoulli_(1 - p, generator=generator)
    anchor = anchor.detach().to(weight.device, weight.dtype)
    # θ₀ + m (θ - θ₀)/(1 - p) is the formula with its terms collected.
    return anchor + (weight - anchor) * (keep / (1 - p))
