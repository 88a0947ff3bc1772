"""Averages of weights on a GPU: the CPU's values, the same bits where that is promised, and copies that training overtakes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from soups.averaging import EMA, LAWA, SWA, PowerEMA, release, update
from soups.averaging import mean as mean_module
from soups.averaging.rounding import noise_like, round_stochastically_
from tests.averaging.test_means import KINDS, run, trajectory

pytestmark = pytest.mark.gpu


def on_gpu(points):
    return [{name: tensor.to("cuda") for name, tensor in point.items()} for point in points]


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_of_the_cpu(kind):
    points = trajectory(9, torch.float32)
    found, wanted = run(KINDS[kind](), on_gpu(points)), run(KINDS[kind.removesuffix("-bfloat16")](), points)
    tolerance = 3e-2 if kind == "ema-bfloat16" else 1e-6  # nine roundings to eight bits
    for name, tensor in wanted.items():
        assert found[name].is_cuda and found[name].stride() == tensor.stride()
        torch.testing.assert_close(found[name].cpu().float(), tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_on_the_cpu_has_the_bits_of_an_average_of_weights_on_the_cpu(kind):
    points = trajectory(9, torch.float32)
    behind, waiting, beside = KINDS[kind](device="cpu"), KINDS[kind](device="cpu", background=False), KINDS[kind]()
    weights = {name: tensor.clone() for name, tensor in on_gpu(points)[0].items()}
    for point in points:
        release([behind, waiting, beside])
        for name, tensor in point.items():
            weights[name].copy_(tensor)
        update([behind, waiting, beside], weights, released=False)
    copies = [tensor for part in behind._pass.offload.host.values() for tensor in part]
    assert all(tensor.is_pinned() for tensor in copies if tensor.numel())
    assert not any(tensor.is_cuda for tensor in behind.value().values())
    same(behind.value(), run(KINDS[kind](), points))
    same(waiting.value(), behind.value())
    same(beside.value(), run(KINDS[kind](), on_gpu(points)))


@pytest.mark.parametrize("released", [True, False])
def test_weights_that_change_while_their_copy_is_queued_are_copied_as_they_were(released):
    work, weights = torch.randn(4096, 4096, device="cuda"), {"w": torch.zeros(1 << 24, device="cuda")}
    average = SWA(device="cpu")
    for value in range(1, 9):
        for _ in range(20):  # the copy is queued behind milliseconds of work, and what follows it is queued at once
            work = (work @ work).clamp_(-1, 1)
        weights["w"].fill_(value)
        update([average], weights, released=released)
        if not released:
            release([average])
        weights["w"].fill_(-1e9)
    torch.testing.assert_close(average.value()["w"], torch.full((1 << 24,), 4.5))


def test_weights_that_are_freed_before_their_copy_is_made_are_copied_all_the_same():
    work, average = torch.randn(4096, 4096, device="cuda"), SWA(device="cpu")
    for value in range(1, 5):
        for _ in range(20):
            work = (work @ work).clamp_(-1, 1)
        update([average], {"w": torch.full((1 << 22,), float(value), device="cuda")})
        torch.full((1 << 22,), -1e9, device="cuda")  # what might get the memory
    torch.testing.assert_close(average.value()["w"], torch.full((1 << 22,), 2.5))


@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_restored_from_a_file_they_continue_to_the_last_bit(kind, place, tmp_path):
    points = on_gpu(trajectory(9, torch.float32))
    whole, part, again = (KINDS[kind](device=place) for _ in range(3))
    run(whole, points)
    run(part, points[:5])
    torch.save(part.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    run(again, points[5:])
    same(again.value(), whole.value())
    assert {t.device.type for t in again.value().values()} == {place or "cuda"}
    same(copy.deepcopy(again).value(), whole.value())


def test_one_pass_gives_the_bits_of_separate_updates():
    points = on_gpu(trajectory(8, torch.float32))
    apart = {kind: run(make(), points) for kind, make in KINDS.items()}
    together = {kind: make() for kind, make in KINDS.items()}
    for point in points:
        update(list(together.values()), point)
    for kind, average in together.items():
        same(average.value(), apart[kind])


def test_fused_changes_nothing_there():
    points = on_gpu(trajectory(6, torch.float32))
    same(run(EMA(0.9, fused=True), points), run(EMA(0.9), points))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_ring_on_the_cpu_or_on_disk_gives_the_bits_of_one_on_the_device(dtype, tmp_path):
    points = on_gpu(trajectory(40, torch.float32))  # long enough for parts to be computed anew
    wanted = run(LAWA(4, snapshot_dtype=dtype), points)
    for place in ("cpu", "disk"):
        average = LAWA(4, snapshots=place, snapshot_dtype=dtype, folder=tmp_path)
        same(run(average, points), wanted)
        assert not average._planes["ring0"]["big"].is_cuda and average.value()["big"].is_cuda


def test_stochastic_rounding_is_unbiased_and_repeatable_there():
    source = torch.full((200_000,), 1.0 + 1 / 512, device="cuda")
    first, second = (torch.empty_like(source, dtype=torch.bfloat16) for _ in range(2))
    for target in (first, second):
        round_stochastically_(target, source, noise_like(source, torch.Generator("cuda").manual_seed(0)))
    assert torch.equal(first, second) and set(first.unique().tolist()) == {1.0, 1.0078125}
    assert float(first.float().mean()) == pytest.approx(float(source[0]), abs=2e-5)


def test_an_update_needs_no_memory_but_a_groups_conversion():
    for dtype, most in ((torch.float32, 0), (torch.bfloat16, 4 * mean_module.GROUP_ELSEWHERE)):
        weights = {str(number): torch.ones(1 << 22, dtype=dtype, device="cuda") for number in range(16)}
        averages = [EMA(0.9), SWA(), PowerEMA(0.1)]
        for _ in range(2):
            update(averages, weights)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update(averages, weights)
        assert torch.cuda.max_memory_allocated() - before <= most + (1 << 20)


@pytest.mark.parametrize("place", [None, "cpu"])
def test_nothing_stays_on_the_device(place):
    def use():
        weights = {"w": torch.ones(1 << 22, device="cuda")}
        averages = [make(device=place) for make in KINDS.values()]
        for _ in range(3):
            update(averages, weights)
        for average in averages:
            average.value()

    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        use()
        gc.collect()
        assert torch.cuda.memory_allocated() == before
