"""Averages updated by a compiled kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from soups.averaging import EMA, LAWA, SWA, PowerEMA, update
from soups.averaging.ema import ema_weight
from soups.averaging.fusing import lerp_together
from soups.averaging.power import gamma_of
from soups.errors import ConfigError

SHAPES = {"matrix": (300, 41), "bias": (7,), "scalar": (), "empty": (0, 3), "conv": (64, 3, 7, 7), "long": (140_001,)}


def points(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = [{name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} for _ in range(count)]
    for point in made:
        point["conv"] = point["conv"].to(memory_format=torch.channels_last)
        point["strided"] = torch.randn(6, 8, generator=draw)[:, ::2]  # not dense
    return made


def stepwise(weights, path):
    """The kernel's formula, an operation at a time: every operation rounds to float32."""
    mean = {name: tensor.clone() for name, tensor in path[0].items()}
    for weight, point in zip(weights, path[1:], strict=True):
        mean = {name: old + (point[name] - old) * torch.tensor(weight) for name, old in mean.items()}
    return mean


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def power_weight(count, sigma):
    """β = (1 − 1/t)^(γ+1) at the t-th point; t − 1 came before."""
    return 1 - (1 - 1 / (count + 1)) ** (gamma_of(sigma) + 1)


@pytest.mark.slow  # each number of averages is one compilation
def test_fused_averages_have_the_bits_of_the_formula_however_many_there_are():
    path = points(5)
    ema, power, alone = EMA(0.9, fused=True), PowerEMA(0.1, fused=True), EMA(0.9, fused=True)
    beside = LAWA(2)  # never fused; and then tensors are not cut as they are for fused averages alone
    late = EMA(0.5, warmup="none", fused=True)
    for number, point in enumerate(path):
        update([ema, power, *([late] if number >= 2 else [])], point)
        update([alone, beside], point)
    assert same(ema.value(), stepwise([ema_weight(count, 0.9) for count in range(1, 5)], path))
    assert same(power.value(), stepwise([power_weight(count, 0.1) for count in range(1, 5)], path))
    assert same(late.value(), stepwise([1 / 2, 1 / 2], path[2:]))
    assert same(alone.value(), ema.value())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda **keep: EMA(0.9, **keep),
        lambda **keep: PowerEMA(0.1, **keep),
        lambda **keep: PowerEMA(0.1, dtype="float64", **keep),
        lambda **keep: EMA(0.9, dtype="bfloat16", **keep),  # rounded at random: not fused, the same bits
    ],
)
def test_a_fused_average_is_the_plain_one_up_to_rounding_and_resumes_exactly(make):
    path = points(6, seed=1)
    plain, fused, resumed = make(), make(fused=True), make(fused=True)
    for number, point in enumerate(path):
        plain.update(point)
        fused.update(point)
        if number == 3:
            resumed.load_state_dict(fused.state_dict())
        if number > 3:
            resumed.update(point)
    assert same(resumed.value(), fused.value())
    for name, tensor in plain.value().items():
        eps = torch.finfo(tensor.dtype).eps if tensor.dtype != torch.bfloat16 else 0.0
        torch.testing.assert_close(fused.value()[name], tensor, rtol=8 * eps, atol=8 * eps)


@pytest.mark.slow
def test_the_number_of_threads_does_not_change_a_bit():
    before, found = torch.get_num_threads(), []
    path = [{"w": point} for point in torch.randn(3, 300_007, generator=torch.Generator().manual_seed(2))]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch._dynamo.reset()  # kernels are compiled for a number of threads
            ema = EMA(0.9, fused=True)
            for point in path:
                ema.update(point)
            found.append(ema.value())
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
    assert same(found[0], found[1])


@pytest.mark.slow
def test_without_a_compiler_the_error_says_what_to_do(tmp_path):
    program = (
        "import torch; from soups.averaging import EMA\n"
        "e = EMA(0.9, fused=True)\n"
        "for _ in range(2): e.update({'w': torch.ones(10)})"
    )
    env = {**os.environ, "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert result.returncode == 1
    assert "ConfigError: fused=True compiles a kernel, and that failed" in result.stderr
    assert "Leave fused out" in result.stderr


def test_what_cannot_be_fused_is_refused_and_typing_errors_too():
    with pytest.raises(ConfigError, match="nothing to fuse"):
        LAWA(2, fused=True)
    with pytest.raises(ConfigError, match=r"SWA keeps a sum.*nothing to fuse"):
        SWA(fused=True)
    with pytest.raises(ConfigError, match=r"no option 'fusd'.*fused"):
        EMA(0.9, fusd=True)


def test_tensors_that_are_not_dense_need_no_kernel():
    theta, average = torch.arange(12.0).view(3, 4)[:, ::2], torch.zeros(3, 4)[:, ::2]
    lerp_together([theta], [([average], torch.tensor(0.25))])
    assert torch.equal(average, theta * 0.25)
