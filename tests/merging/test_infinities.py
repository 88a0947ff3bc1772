"""Infinities that all models share stay; everything around them is merged as though they were not there."""

import pytest
import torch

from soups.errors import WeightsError
from soups.merging import make_method, merge
from soups.merging.job import Job
from soups.merging.methods import METHODS
from soups.merging.operands import Source
from soups.merging.stream import MemorySink, run
from soups.stores import DictStore, TensorMeta

INFINITY = float("inf")
SIZE = 70_001
PLACES = {5000: INFINITY, 20_000: -INFINITY, 40_000: INFINITY, SIZE - 1: -INFINITY}


def family(count, size=SIZE):
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=draw)
    models = [base + 0.1 * torch.randn(size, generator=draw) for _ in range(count)]
    for tensor in (base, *models):
        for place, value in PLACES.items():
            tensor[place] = value
    return base, models


def with_zeros(tensor):
    return torch.where(torch.isinf(tensor), 0, tensor)


@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "median", "ties", "ties.peft", "slerp", "model_stock", "dare"]
)
def test_shared_infinities_stay_wherever_they_are(name, compiled):
    method = make_method(name)
    base, models = family(method.most or 2)
    start = None if method.base == "none" else {"w": base}
    found = merge(name, [{"w": one} for one in models], base=start, compiled=compiled)["w"]
    plain = merge(
        name,
        [{"w": with_zeros(one)} for one in models],
        base=start and {"w": with_zeros(base)},
        compiled=compiled,
    )["w"]
    for place, value in PLACES.items():
        assert found[place] == value
    rest = ~torch.isinf(base)
    assert rest.sum() == SIZE - 4 and torch.equal(found[rest], plain[rest])


def test_values_around_infinities_are_the_mean():
    base, models = family(3)
    found = merge("linear", [{"w": one} for one in models])["w"]
    rest = ~torch.isinf(base)
    mean = torch.stack([one[rest].double() for one in models]).mean(0).float()
    assert torch.equal(found[rest], mean)
    low = merge("linear", [{"w": one.bfloat16()} for one in models[:2]] + [{"w": models[2]}])["w"]
    assert low.dtype == torch.bfloat16 and torch.equal(torch.isinf(low), ~rest)


@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
def test_infinities_in_several_chunks(name, compiled):
    base, models = family(2)
    stores = [DictStore({"w": one}, f"model {number}") for number, one in enumerate(models)]
    sources = tuple(Source(store, "w") for store in stores)
    start = Source(DictStore({"w": base}, "base"), "w") if METHODS[name].base != "none" else None
    meta = TensorMeta((SIZE,), torch.float32)
    job = Job("w", meta, make_method(name), sources, start)
    results = []
    for chunk in (16_384, 32_768, 131_072):
        sink = MemorySink({"w": meta})
        run([job], sink, chunk=chunk, compiled=compiled)
        results.append(sink.weights["w"])
    assert all(torch.equal(results[0], one) for one in results[1:])
    assert {place: float(results[0][place]) for place in torch.isinf(results[0]).nonzero().view(-1).tolist()} == PLACES


@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "slerp"])
@pytest.mark.parametrize(
    ("place", "value"), [(60_000, INFINITY), (40_000, -INFINITY), (40_000, 1.0), (3, float("nan"))]
)
def test_a_model_that_disagrees_is_an_error(name, compiled, place, value):
    method = make_method(name)
    base, models = family(method.most or 2)
    models[-1][place] = value
    start = None if method.base == "none" else {"w": base}
    with pytest.raises(WeightsError, match=r"'w' holds non-finite values \(NaN or infinity; 1 between"):
        merge(name, [{"w": one} for one in models], base=start, compiled=compiled)


def test_a_constant_tensor_has_no_part_in_the_rest():
    draw = torch.Generator().manual_seed(1)
    mask = torch.zeros(200, 200)
    mask[150:, 199] = -INFINITY  # the first is beyond element 30000
    base = {"mask": mask, "w": torch.randn(50, 40, generator=draw)}
    experts = [{"mask": mask, "w": base["w"] + 0.1 * torch.randn(50, 40, generator=draw)} for _ in range(2)]
    found = merge("ties", experts, base=base)
    alone = merge("ties", [{"w": one["w"]} for one in experts], base={"w": base["w"]})
    assert torch.equal(found["mask"], mask) and torch.equal(found["w"], alone["w"])


def test_complex_and_narrow_infinities():
    values = torch.zeros(5000, dtype=torch.complex64)
    values[4999] = complex(INFINITY, 1)
    other = values.clone()
    other[0] = 2
    found = merge("linear", [{"w": values}, {"w": other}])["w"]
    assert found[0] == 1 and torch.isinf(found[4999])
    half = torch.ones(5000, dtype=torch.float16)
    half[4998] = -INFINITY
    found = merge("linear", [{"w": half}, {"w": 3 * half}])["w"]
    assert found[0] == 2 and found[4998] == -INFINITY
