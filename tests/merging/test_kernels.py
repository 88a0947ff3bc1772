"""Compiled loops give the bits of the torch operations in whose place they are."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError, WeightsError
from soups.merging import kernels, make_method, merge
from soups.merging.kernels import compiling, count_digits_, difference, place_of
from soups.merging.noise import random_bits
from soups.merging.operands import BLOCK
from soups.merging.stages import TaskVectors

pytest.importorskip("numba")


def rows_of_task_vectors():
    path = Path(__file__).parent / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_of_kernels", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return [row for row in module.ROWS if isinstance(make_method(row.name, **row.parameters), TaskVectors)]


every = pytest.mark.parametrize("row", rows_of_task_vectors(), ids=lambda row: f"{row.name}{row.parameters or ''}")
SHAPES = {"matrix": (3 * BLOCK // 64 + 7, 64), "row": (1500,), "scalar": (), "empty": (0, 4), "small": (5, 3)}


def family(models, dtype, *, coarse):
    """A base and models; coarse ones have many equal magnitudes."""
    random = torch.Generator().manual_seed(0)

    def weights(scale):
        found = {name: torch.randn(shape, generator=random) * scale for name, shape in SHAPES.items()}
        return {name: (tensor * 8).round() / 8 if coarse else tensor for name, tensor in found.items()}

    base = weights(1.0)
    experts = [{name: base[name] + delta for name, delta in weights(0.3).items()} for _ in range(models)]
    return [{name: tensor.to(dtype) for name, tensor in one.items()} for one in (base, *experts)]


@every
@pytest.mark.parametrize("budget", [1 << 19, 1 << 26], ids=["streamed", "held"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_a_merge_has_the_same_bits(row, budget, dtype):
    base, *experts = family(row.models, dtype, coarse=dtype == torch.bfloat16)
    method = make_method(row.name, **row.parameters)
    plain = merge(method, experts, base=base, dtype=torch.float32, budget=budget, threads=1, compiled=False)
    compiled = merge(method, experts, base=base, dtype=torch.float32, budget=budget, threads=2, compiled=True)
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.int32), compiled[name].view(torch.int32)), name


def test_models_of_several_dtypes_have_the_same_bits():
    base, *experts = family(3, torch.float32, coarse=False)
    experts[1] = {name: tensor.bfloat16() for name, tensor in experts[1].items()}
    experts[2] = {name: tensor.half() for name, tensor in experts[2].items()}
    plain, compiled = (merge("ties", experts, base=base, compiled=choice) for choice in (False, True))
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_float64_is_not_compiled():
    base, *experts = family(2, torch.float64, coarse=False)
    plain, compiled = (merge("ties", experts, base=base, compiled=choice) for choice in (False, True))
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize("method", ["ties", "ties.mergekit", "dare_ties.mergekit", "breadcrumbs", "task_arithmetic"])
def test_a_nan_is_still_found(method):
    base, *experts = family(2, torch.float32, coarse=False)
    experts[1]["matrix"][3, 3] = float("nan")
    with pytest.raises(WeightsError, match=r"matrix.*non-finite"):
        merge(
            make_method(method, density=0.5) if method != "task_arithmetic" else method,
            experts,
            base=base,
            compiled=True,
        )


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 10**7), count=st.integers(1, 3000), seed=st.integers(0, 5))
def test_random_numbers_are_numpys(start, count, seed):
    plain = random_bits(seed, "w", 1, start, count)
    with compiling():
        assert np.array_equal(random_bits(seed, "w", 1, start, count), plain)


magnitudes = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(values=magnitudes, data=st.data())
def test_digits_and_places(values, data):
    tensor = torch.tensor(values)
    pattern = int(tensor.view(torch.int32)[data.draw(st.integers(0, len(values) - 1))])
    found = []
    for on in (False, True):
        high, low = torch.zeros(2, 1 << 16, dtype=torch.int64)
        with compiling(on):
            count_digits_(high, tensor, 16, None)
            count_digits_(low, tensor, 0, pattern >> 16)
            places = [place_of(tensor, values[0], number) for number in (1, 2, 9)]
        found.append((high, low, places))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2]
    assert int(found[1][0].sum()) == len(values) and int(found[1][1][pattern & 0xFFFF]) >= 1


def test_a_difference_is_rounded_once():
    model, base = torch.randn(2, 5000).unbind()
    for dtype in (torch.bfloat16, torch.float32):
        with compiling():
            out = difference(model.to(dtype), base, torch.empty(5000))
        assert torch.equal(out, model.to(dtype).float() - base)


def test_without_numba_a_merge_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kernels, "can_compile", lambda: False)
    base, *experts = family(1, torch.float32, coarse=False)
    with pytest.raises(ConfigError, match=r"soups\[fast\]"):
        merge("ties", experts, base=base, compiled=True)
    assert merge("ties", experts, base=base)["row"].shape == (1500,)


def test_a_numba_that_cannot_be_imported_is_named(monkeypatch):
    def fail(name):
        raise ImportError("Numba needs NumPy 2.2 or less")

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    base, *experts = family(1, torch.float32, coarse=False)
    with pytest.raises(ConfigError, match=r"needs NumPy 2.2 or less.*--no-compiled"):
        merge("ties", experts, base=base, compiled=True)


def test_a_loop_that_has_begun_outlives_the_switch():
    # Another merge in this process may end between the question whether to compile and the loop.
    before, after = kernels.magnitudes(torch.tensor([-2.0, 1.0]), kernels.Choice(factor=3.0))
    assert before.tolist() == [2.0, 1.0]
    assert after.tolist() == [6.0, 3.0]
