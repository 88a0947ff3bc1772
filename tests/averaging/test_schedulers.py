"""The learning rates of stochastic weight averaging."""

from __future__ import annotations

import pytest
import torch

from soups.averaging import constant_swa, cyclic_swa
from soups.errors import ConfigError


def rates(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    found = rates(lambda o: constant_swa(o, start=20, swa_lr=0.02), 30)
    assert found[:11] == pytest.approx([0.1] * 11)
    assert found[14] == pytest.approx(0.06)  # half-way between half and nine tenths of the start
    assert found[18:] == pytest.approx([0.02] * 12)
    found = rates(lambda o: constant_swa(o, start=10, swa_lr=0.02, anneal=5), 15)
    assert found[:6] == pytest.approx([0.1] * 6) and found[10:] == pytest.approx([0.02] * 5)


def test_cyclic():
    found = rates(lambda o: cyclic_swa(o, start=2, cycle=4, high=0.08, low=0.02), 10)
    assert found == pytest.approx([0.1, 0.1, 0.065, 0.05, 0.035, 0.02, 0.065, 0.05, 0.035, 0.02])


def test_refusals():
    for make in (
        lambda o: constant_swa(o, start=0, swa_lr=0.1),
        lambda o: cyclic_swa(o, start=0, cycle=3, high=0.1, low=0.2),
    ):
        with pytest.raises(ConfigError):
            rates(make, 1)
