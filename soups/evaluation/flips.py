"""What an update breaks: samples that the old model had right and the new one has wrong."""

from __future__ import annotations

from torch import Tensor

from soups.evaluation.statistics import negative_flips, right


def negative_flip_rate(old: Tensor, new: Tensor, labels: Tensor) -> float:
    """Return the share of samples that `old` has right and `new` wrong (arXiv:2301.10546), in [0, 1].

    `soups.evaluation.statistics.negative_flips` gives it with an interval.

    Args:
        old, new: logits (N, classes).
        labels: (N,).

    >>> import torch
    >>> old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]); new = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> negative_flip_rate(old, new, torch.tensor([0, 1]))
    0.5
    """
    return negative_flips(right(old, labels), right(new, labels)).value
