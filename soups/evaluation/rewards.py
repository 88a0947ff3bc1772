"""How good rewards are: pairs they order rightly, and what best-of-N sampling against them really gains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from soups.errors import DataError


def pair_accuracy(rewards: Tensor, truth: Tensor, gap: float = 0.0) -> tuple[float, int]:
    """Return the share of all pairs of N texts that rewards order as the truth does, and how many pairs there are.

    Args:
        rewards: (N,); equal ones count half.
        truth: (N,).
        gap: pairs whose truths differ by less are left out.

    Raises:
        DataError: no pair differs enough.

    >>> pair_accuracy(torch.tensor([0.1, 0.5, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    (0.6666666666666666, 3)
    """
    first, second = torch.triu_indices(len(truth), len(truth), offset=1)
    difference = truth[second].double() - truth[first].double()
    counted = difference.abs() >= max(gap, 1e-12)
    if not counted.any():
        raise DataError(f"No two of {len(truth)} texts differ by {gap} in truth.")
    agreement = (rewards[second].double() - rewards[first].double())[counted].sign() * difference[counted].sign()
    return float((agreement + 1).mean() / 2), int(counted.sum())


def best_of_n(rewards: Tensor, gold: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the expected gold value of the candidate with the highest reward among N drawn at random, exactly.

    Candidates are drawn from the pool without replacement, so the k-th lowest of T rewards is the best of N with
    probability C(k − 1, N − 1) / C(T, N): no sampling is needed.

    Args:
        rewards: what selects, (T,); of equal ones the later counts as higher.
        gold: what is reported, (T,).
        sizes: the N, each from 1 to T.

    Raises:
        DataError: an N outside 1 to T.

    >>> best_of_n(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 5.0]), [1, 2, 3])
    [2.0, 3.6666666666666665, 5.0]
    """
    total = len(rewards)
    sorted_gold = gold.double()[rewards.argsort(stable=True)].tolist()
    values: list[float] = []
    for size in sizes:
        if not 1 <= size <= total:
            raise DataError(f"Best of {size} needs from 1 to {total} candidates.")
        draws = math.comb(total, size)
        values.append(math.fsum(math.comb(k, size - 1) * value for k, value in enumerate(sorted_gold)) / draws)
    return values


def best_of_n_kl(size: int) -> float:
    """Return the KL divergence in nats of best-of-N from the policy that it samples: log N − (N − 1)/N.

    >>> best_of_n_kl(1), round(best_of_n_kl(4), 3)
    (0.0, 0.636)
    """
    return math.log(size) - (size - 1) / size
