"""Rewards: pair accuracy and best-of-N against brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soups.errors import DataError
from soups.evaluation import best_of_n, best_of_n_kl, pair_accuracy

VALUES = st.lists(st.integers(-5, 5), min_size=2, max_size=7)


@given(values=VALUES, seed=st.integers(0, 20), gap=st.sampled_from([0.0, 1.0, 3.0]))
def test_pair_accuracy_is_counting(values: list[int], seed: int, gap: float) -> None:
    truth = torch.tensor(values, dtype=torch.float32)
    rewards = torch.randint(4, (len(values),), generator=torch.Generator().manual_seed(seed)).float()
    pairs = [(i, j) for i, j in itertools.combinations(range(len(values)), 2) if values[i] != values[j]]
    pairs = [(i, j) for i, j in pairs if abs(values[i] - values[j]) >= gap]
    if not pairs:
        with pytest.raises(DataError, match="differ by"):
            pair_accuracy(rewards, truth, gap)
        return
    points = [
        0.5 if rewards[i] == rewards[j] else float((rewards[i] < rewards[j]) == (values[i] < values[j]))
        for i, j in pairs
    ]
    found, count = pair_accuracy(rewards, truth, gap)
    assert count == len(pairs) and found == pytest.approx(sum(points) / len(points))


@given(gold=VALUES, size=st.integers(1, 7), seed=st.integers(0, 20))
def test_best_of_n_is_the_mean_over_all_draws(gold: list[int], size: int, seed: int) -> None:
    rewards = torch.randperm(len(gold), generator=torch.Generator().manual_seed(seed)).float()
    truth = torch.tensor(gold, dtype=torch.float32)
    if size > len(gold):
        with pytest.raises(DataError, match=f"Best of {size}"):
            best_of_n(rewards, truth, [size])
        return
    draws = list(itertools.combinations(range(len(gold)), size))
    expected = sum(gold[max(draw, key=lambda number: float(rewards[number]))] for draw in draws) / len(draws)
    assert best_of_n(rewards, truth, [size])[0] == pytest.approx(expected)


def test_the_divergence_of_best_of_n() -> None:
    # The best of N has the density N F^(N−1) relative to the sampled one, F uniform in [0, 1].
    place = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    density = 16 * place**15
    assert best_of_n_kl(16) == pytest.approx(float((density * density.log()).mean()), abs=1e-4)
    assert best_of_n_kl(16) == math.log(16) - 15 / 16
