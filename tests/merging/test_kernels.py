"""Compiled loops give the bits of the torch operations in whose place they are."""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from soups.errors import ConfigError, StorageError, WeightsError
from soups.merging import kernels, make_method, merge
from soups.merging.kernels import compiling, difference
from soups.merging.noise import kept, kept_each
from soups.merging.ordering import count_digits_, place_of
from soups.merging.stages import TaskVectors
from soups.merging.sums import BLOCK
from soups.stores import open_store

# Where there is a compiler, loops that were not built are a fault and not a reason to look away.
if (reason := kernels.unavailable()) and shutil.which("cc") is None:
    pytest.skip(reason, allow_module_level=True)


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
    limits = np.random.default_rng(seed).integers(0, 1 << 16, count).astype(np.uint16)
    plain = kept(0.3, seed, "w", 1, start, count), kept_each(limits, seed, "w", 1, start, count)
    with compiling():
        assert np.array_equal(kept(0.3, seed, "w", 1, start, count), plain[0])
        assert np.array_equal(kept_each(limits, seed, "w", 1, start, count), plain[1])


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


def test_without_the_loops_a_merge_says_how_to_get_them(monkeypatch):
    base, *experts = family(1, torch.float32, coarse=False)
    with_them = merge("ties", experts, base=base)
    monkeypatch.setattr(kernels, "_loops", None)
    monkeypatch.setattr(kernels, "_missing", "No module named '_loops'")
    with pytest.raises(ConfigError, match=r"_loops.*C compiler.*--no-compiled"):
        merge("ties", experts, base=base, compiled=True)
    without = merge("ties", experts, base=base)
    assert all(torch.equal(with_them[name], without[name]) for name in without)


def test_loops_of_another_version_are_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "_VERSION", -1)
    base, *experts = family(1, torch.float32, coarse=False)
    with pytest.raises(ConfigError, match=r"another version.*pip install"):
        merge("ties", experts, base=base, compiled=True)
    assert merge("ties", experts, base=base)["row"].shape == (1500,)


def test_a_loop_that_has_begun_outlives_the_switch():
    # Another merge in this process may end between the question whether to compile and the loop.
    rows = [torch.tensor([-2.0, 1.0])]
    before, after = kernels.block_norms(rows, None, [kernels.Choice(factor=3.0)], 2, BLOCK)
    assert before.tolist() == [[3.0]]
    assert after.tolist() == [[9.0]]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 5000), block=st.integers(1, 3000), narrow=st.booleans())
def test_sums_of_blocks(count, block, narrow):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).abs()
    if narrow:
        values = values.bfloat16().float()
    plain = kernels.block_sums(values, block)
    with compiling():
        assert torch.equal(kernels.block_sums(values, block), plain)
    exact = [float(part.double().sum()) for part in values.split(block)] if count else []
    assert plain.tolist() == pytest.approx(exact, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=200), narrow=st.booleans())
def test_what_is_finite(bits, narrow):
    values = torch.tensor(np.array(bits, np.uint32).view(np.float32))
    values = values.bfloat16() if narrow else values
    with compiling():
        assert kernels.all_finite(values) == bool(torch.isfinite(values).all())
    assert kernels.all_finite(values) == bool(torch.isfinite(values).all())


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_narrowing_is_torchs(bits):
    wide = torch.tensor(np.array(bits, np.uint32).view(np.float32))
    found = kernels.weighted_sum([wide], [1.0], len(bits), divisor=1.0, into=torch.bfloat16)
    expected = wide.bfloat16()
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties.mergekit", "della.mergekit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_files_are_read_to_the_same_bits(tmp_path, method, dtype):
    paths = []
    for number, weights in enumerate(family(3, dtype, coarse=False)):
        # Batches are of 32,768 elements; this one ends within one, and begins at an odd place.
        paths.append(tmp_path / f"{number}.safetensors")
        generator = torch.Generator().manual_seed(number)
        save_file({**weights, "long": torch.randn(70_003, generator=generator).to(dtype)}, paths[-1])
    base = paths[0] if make_method(method).base == "required" else None
    found = [merge(method, paths[1:], base=base, compiled=choice) for choice in (False, True)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_transposed_tensor_in_a_file_is_read_in_its_order(tmp_path):
    models = [{"w": torch.randn(40, 30).T, "v": torch.randn(7)} for _ in range(2)]
    assert not models[0]["w"].is_contiguous()
    for number, weights in enumerate(models):
        (tmp_path / str(number)).mkdir()
        torch.save(weights, tmp_path / f"{number}.pt")
        torch.save(weights, tmp_path / str(number) / "pytorch_model.bin")
    for places in ([tmp_path / "0.pt", tmp_path / "1.pt"], [tmp_path / "0", tmp_path / "1"]):
        merged = merge("linear", places, compiled=True)
        assert torch.equal(merged["w"], (models[0]["w"] + models[1]["w"]) * 0.5)


@pytest.mark.parametrize("weights", [(1.0, 2.0, -0.5), (0.25, 0.25, 0.25), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_the_same_bits(weights, normalize, into):
    models = family(2, torch.float32, coarse=False)
    models[1] = {name: tensor.bfloat16() for name, tensor in models[1].items()}
    method = make_method("linear", weight=weights, normalize=normalize)
    plain, compiled = (merge(method, models, dtype=into, compiled=choice) for choice in (False, True))
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_a_file_cut_short_under_a_loop_is_named(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        save_file({"w": torch.randn(300_000)}, path)
    with open_store(paths[0]) as whole, open_store(paths[1]) as cut:
        os.truncate(paths[1], 400_000)
        with pytest.raises(StorageError, match=r"1\.safetensors ends before its contents do"):
            merge("linear", [whole, cut], compiled=True)


def test_a_mistake_is_an_error_and_no_access_outside():
    loops = kernels._module()
    three, four = np.zeros(3, np.float32), np.zeros(4, np.float32)
    room = np.zeros(3 * 32 * 4 + 3 * 1024 * 4 + 32, np.uint8)
    wrong = [
        lambda: loops.difference(three, four, four),
        lambda: loops.difference(np.zeros(4, np.float64), four, four),
        lambda: loops.weighted_sum([three], np.ones(1), 1.0, 32, room, four),
        lambda: loops.weighted_sum([four], np.ones(2), 1.0, 32, room, four),
        lambda: loops.weighted_sum([four], np.ones(1), 1.0, 32, room[1:].copy(), four),
        lambda: loops.weighted_sum([(-1, 0, 4)], np.ones(1), 1.0, 32, room, four),
        lambda: loops.weighted_sum([(0, 0, 8)], np.ones(1), 1.0, 32, room, four),
        lambda: loops.weighted_sum([four], np.ones(1, np.float32), 1.0, 32, room, four),
        lambda: loops.weighted_sum([four, np.zeros(4, np.uint16)], np.ones(2), 1.0, 32, room, four),
        lambda: loops.draw((np.zeros(3, np.uint64), 0, np.zeros(1, np.uint16)), np.zeros(4, np.uint8)),
        lambda: loops.draw((np.zeros(4, np.uint64), 0, np.zeros(3, np.uint16)), np.zeros(4, np.uint8)),
        lambda: loops.count_digits(four, 0, False, 0, np.zeros(1 << 16, np.int64)),
        lambda: loops.pack_places(three, 2, np.zeros(3, np.int64)),
        lambda: loops.unpack_places(np.array([0, 5], np.int64), np.zeros(2, np.int32), np.zeros(2, np.int32)),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=":"):
            call()
    with pytest.raises((TypeError, BufferError)):
        loops.difference(four, four, b"read-only memory")
