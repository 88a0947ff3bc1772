"""One reduction behind every average: the same bits, whichever way the models are averaged."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.averaging import SWA
from soups.merging import kernels, make_method, merge
from soups.merging.algebra import weights
from soups.merging.plan import plan_merge
from soups.merging.stream import MemorySink, run
from soups.recipes import uniform
from soups.recipes.recipe import Candidate, mixed
from soups.reduction import Sum, accumulation_dtype, total_weight
from soups.stores import DictStore, write_safetensors
from soups.weights import RunningSum, mean

SHAPES = {"matrix": (301, 70), "long": (70_003,), "conv": (4, 3, 5, 5), "scalar": ()}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPILED = [False] if kernels.unavailable() else [False, True]
every = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def models(count, *dtypes):
    """Models whose magnitudes lie binades apart, so that their sums are rounded."""
    draw = torch.Generator().manual_seed(count)
    return [
        {
            name: (torch.randn(shape, generator=draw, dtype=torch.float64) * 2.0 ** (number % 8)).to(
                dtypes[number % len(dtypes)]
            )
            for name, shape in SHAPES.items()
        }
        for number in range(count)
    ]


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def pool(points):
    return [Candidate(f"{number:02d}", 0.0, lambda point=point: point) for number, point in enumerate(points)]


def swa(points, **keep):
    average = SWA(**keep)
    for point in points:
        average.update(point)
    return average


def in_chunks(points, size, compiled):
    plan = plan_merge("linear", [DictStore(point) for point in points])
    sink = MemorySink(plan.outputs)
    run(plan.jobs, sink, chunk=size, threads=3, compiled=compiled)
    return sink.weights


@every
@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_way_to_average_gives_the_same_bits(dtype, count, tmp_path):
    points = models(count, dtype)
    wanted = uniform(pool(points), lambda weights: 0.0).weights
    assert all(tensor.dtype == dtype for tensor in wanted.values())
    same(mean(points), wanted)
    same(swa(points).value(), wanted)
    same(swa(points, background=True).value(), wanted)
    running = RunningSum()
    for point in points[:-1]:
        running.add(point)
    same(running.mean_with(points[-1]), wanted)
    paths = [tmp_path / f"{number}.safetensors" for number in range(count)]
    for path, point in zip(paths, points, strict=True):
        write_safetensors(path, point)
    for compiled in COMPILED if dtype != torch.float64 else [False]:
        same(merge("linear", points, compiled=compiled, threads=1), wanted)
        same(merge("linear", paths, compiled=compiled, threads=2, budget=1), wanted)
        same(in_chunks(points, 16_384, compiled), wanted)


@every
def test_averages_are_the_exact_mean_rounded(dtype):
    points = models(5, dtype)
    found = mean(points)
    eps = torch.finfo(dtype).eps
    for name in SHAPES:
        for place in range(0, points[0][name].numel(), 997):
            exact = sum(Fraction(float(point[name].reshape(-1)[place])) for point in points) / 5
            error = abs(Fraction(float(found[name].reshape(-1)[place])) - exact)
            # Half a unit in the last place; the sum's own rounding adds next to nothing below float64.
            slack = Fraction(1, 1) if dtype != torch.float64 else Fraction(12)
            largest = max(abs(Fraction(float(point[name].reshape(-1)[place]))) for point in points)
            narrow = Fraction(4, 2**24) * largest if dtype.itemsize < 4 else 0
            assert (
                error <= slack * Fraction(eps) / 2 * (abs(exact) + (largest if dtype == torch.float64 else 0)) + narrow
            )


@every
@pytest.mark.parametrize("count", [2, 3, 7, 11, 49])
def test_copies_of_one_model_have_it_as_their_mean(dtype, count):
    (point,) = models(1, dtype)
    if dtype != torch.float64:  # n · x has no room left in float64
        same(mean([point] * count), point)
        same(swa([point] * count).value(), point)
        same(merge("linear", [point] * count), point)


@pytest.mark.parametrize("shares", [(1.0, 2.0, -0.5, 0.1), (0.3, 0.3, 0.3, 0.3), (0.1, 0.2, 0.3, 0.4)])
@every
def test_weighted_averages_too(dtype, shares):
    points = models(4, dtype)
    parts = [
        (str(number), lambda point=point: point, share)
        for number, (point, share) in enumerate(zip(points, shares, strict=False))
    ]
    wanted = mixed(parts)
    method = make_method("linear", weight=shares)
    for compiled in COMPILED if dtype != torch.float64 else [False]:
        same(merge(method, points, compiled=compiled), wanted)
    total = total_weight(shares)
    if total == 1.0:
        expression = sum(
            (share * weights(point) for share, point in zip(shares[1:], points[1:], strict=False)),
            shares[0] * weights(points[0]),
        )
        same(expression.load(), wanted)


@pytest.mark.parametrize(
    "order", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
def test_models_of_two_dtypes(order):
    points = models(4, *order)
    wanted = mean(points)
    for compiled in COMPILED if torch.float64 not in order else [False]:
        same(merge("linear", points, compiled=compiled), wanted)


def test_a_resumed_average_has_the_same_bits():
    points = models(6, torch.float32)
    average = swa(points[:4])
    state = average.state_dict()
    same(state["planes"]["mean"], mean(points[:4]))
    resumed = SWA()
    resumed.load_state_dict(state)
    same(resumed.value(), mean(points[:4]))
    for point in points[4:]:
        resumed.update(point)
    same(resumed.value(), mean(points))


def test_a_mean_without_its_sum_goes_on():
    points = models(6, torch.float32)
    state = swa(points[:4]).state_dict()
    del state["planes"]["sum"]
    resumed = SWA()
    resumed.load_state_dict(state)
    same(resumed.value(), mean(points[:4]))
    for point in points[4:]:
        resumed.update(point)
    for name, tensor in mean(points).items():
        torch.testing.assert_close(resumed.value()[name], tensor, rtol=1e-5, atol=1e-5)


def test_weights_that_cancel_are_refused_however_they_are_rounded():
    points = models(3, torch.float32)
    for shares in ((1.0, -2.0, 1.0), (0.1, 0.2, -0.3)):
        with pytest.raises(Exception, match="sum to zero"):
            merge(make_method("linear", weight=shares), points)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
def test_the_sum_is_as_wide_as_its_widest_term(dtypes):
    total = Sum()
    for dtype in dtypes:
        total.add(torch.ones(3, dtype=dtype), 2.0)
    assert total.quotient(2.0 * len(dtypes)).tolist() == [1.0] * 3
    assert total.quotient().dtype == accumulation_dtype(*dtypes)
