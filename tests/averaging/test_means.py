"""Averages against their closed forms, against torch, and against the laws that all of them keep."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from soups.averaging import (
    EMA,
    LAWA,
    SWA,
    PowerEMA,
    averaged,
    ema_update_,
    latest_mean,
    power_update_,
    release,
    swa_update_,
    update,
)
from soups.averaging import lerp as lerp_module
from soups.averaging import mean as mean_module
from soups.averaging.ema import decay_of, ema_weight
from soups.averaging.power import gamma_of
from soups.averaging.rounding import noise_like, round_stochastically_
from soups.errors import ConfigError, WeightsError


def trajectory(count, dtype=torch.float64, seed=0):
    """A random walk of weights of many shapes and layouts."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "scalar": (), "empty": (0, 3), "big": (300, 40), "conv": (4, 3, 2, 2)}
    now = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    now["conv"] = now["conv"].to(memory_format=torch.channels_last)
    points = []
    for _ in range(count):
        now = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw, dtype=dtype) for name, tensor in now.items()
        }
        points.append(now)
    return points


def combine(points, shares):
    return {name: sum(s * p[name].double() for s, p in zip(shares, points, strict=True)) for name in points[0]}


def run(average, points):
    for point in points:
        average.update(point)
    return average.value()


def close(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=tolerance, atol=tolerance)


def ema_shares(count, betas):
    """Weights of the points when the first is copied and the i-th then enters with 1 - betas[i]."""
    shares = [1.0]
    for beta in betas[1:count]:
        shares = [share * beta for share in shares] + [1 - beta]
    return shares


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize(
    ("warmup", "betas"),
    [
        ("none", lambda t, b: b),
        ("count", lambda t, b: min(b, (1 + t) / (10 + t))),
        ("power", lambda t, b: min(b, 1 - (1 + t) ** (-2 / 3))),
    ],
)
def test_ema_with_warm_up(warmup, betas, interval):
    points = trajectory(40)
    shares = ema_shares(40, [betas(t, 0.95**interval) for t in range(40)])
    close(run(EMA(0.95, warmup=warmup, interval=interval), points), combine(points, shares))


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.99999])
def test_debiased_ema_is_adams(decay):
    points = trajectory(30)
    shares = [decay ** (29 - i) * (1 - decay) / (1 - decay**30) for i in range(30)]
    tolerance = 1e-9 if decay > 0.999 else 1e-12  # 1 - decay cancels in the reference, not in ours
    close(run(EMA(decay), points), combine(points, shares), tolerance)
    assert sum(shares) == pytest.approx(1)


def test_half_life_and_sigma():
    assert decay_of(half_life=10) ** 10 == pytest.approx(0.5)
    decay = decay_of(sigma="200st")
    ages = torch.arange(20000, dtype=torch.float64)
    shares = (1 - decay) * decay**ages
    deviation = ((shares * ages**2).sum() - (shares * ages).sum() ** 2).sqrt()
    assert float(deviation) == pytest.approx(200, rel=1e-4)


def test_swa():
    points = trajectory(25)
    close(run(SWA(), points), combine(points, [1 / 25] * 25))


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("count", [1, 5, 7, 20])
def test_lawa_windows(k, count):
    points = trajectory(count)
    kept = points[-k:]
    close(run(LAWA(k), points), combine(kept, [1 / len(kept)] * len(kept)))
    close(latest_mean(kept), combine(kept, [1 / len(kept)] * len(kept)))


def test_lawa_does_not_drift():
    average = LAWA(5)
    draw = torch.Generator().manual_seed(0)
    points = [{"w": torch.randn(300, 40, generator=draw)} for _ in range(3000)]
    for point in points:
        average.update(point)
    exact = torch.stack([point["w"].double() for point in points[-5:]]).mean(0)
    assert float((average.value()["w"].double() - exact).abs().max()) < 8e-7  # 2e-6 and growing without the refresh


@pytest.mark.parametrize("snapshots", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_lawa_ring_elsewhere_and_in_half_the_memory(tmp_path, snapshots, dtype):
    points = trajectory(12, torch.float32)
    average = LAWA(4, snapshots=snapshots, snapshot_dtype=dtype, folder=tmp_path)
    stored = [{n: t.to(torch.bfloat16 if dtype else t.dtype).float() for n, t in point.items()} for point in points]
    close(run(average, points), combine(stored[-4:], [0.25] * 4), 2e-6)
    again = LAWA(4, snapshots=snapshots, snapshot_dtype=dtype, folder=tmp_path / "again")
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    for extra in trajectory(3, torch.float32, seed=5):
        average.update(extra)
        again.update(extra)
    assert all(torch.equal(again.value()[name], tensor) for name, tensor in average.value().items())
    on_disk = [path for path in tmp_path.rglob("*.bin") if path.stat().st_size]
    assert bool(on_disk) == (snapshots == "disk")


@pytest.mark.parametrize("interval", [1, 10])
@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_power_function_ema(sigma, interval):
    points, gamma = trajectory(50), gamma_of(sigma)
    shares = [((i + 1) ** (gamma + 1) - i ** (gamma + 1)) / 50 ** (gamma + 1) for i in range(50)]
    close(run(PowerEMA(sigma, interval=interval), points), combine(points, shares), 1e-11)


def test_sigma_is_the_relative_width_of_the_profile():
    position = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for sigma in (0.03, 0.05, 0.1, 0.2, 12**-0.5):
        density = (gamma_of(sigma) + 1) * position ** gamma_of(sigma) / 100_000
        mean = (density * position).sum()
        assert float(((density * (position - mean) ** 2).sum()).sqrt()) == pytest.approx(sigma, rel=1e-4)
    with pytest.raises(ConfigError):
        gamma_of(0.3)


def model_walk(count, model, dtype=None):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
        yield dict(model.named_parameters())


def test_equal_to_torch_where_torch_is_right():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)).double()
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours_swa, ours_ema = SWA(), EMA(0.9, warmup="none")
    for weights in model_walk(20, model):
        for theirs in (swa, ema):
            theirs.update_parameters(model)
        update([ours_swa, ours_ema], weights)
    close(ours_swa.value(), dict(swa.module.named_parameters()))
    close(ours_ema.value(), dict(ema.module.named_parameters()))


KINDS = {
    "ema": lambda **o: EMA(0.9, **o),
    "ema-count": lambda **o: EMA(0.99, warmup="count", interval=3, **o),
    "ema-bfloat16": lambda **o: EMA(0.9, dtype="bfloat16", **o),
    "swa": lambda **o: SWA(**o),
    "lawa": lambda **o: LAWA(3, **o),
    "power": lambda **o: PowerEMA(0.1, **o),
}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_in_the_background_give_the_same_bits(kind):
    points = trajectory(9, torch.float32)
    behind, plain = KINDS[kind](background=True), KINDS[kind]()
    weights = {name: tensor.clone() for name, tensor in points[0].items()}
    beside = SWA()  # in the same pass, not in the background
    for point in points:
        for name, tensor in point.items():
            weights[name].copy_(tensor)  # training goes on while the last update may still be running
        update([behind, beside], weights, released=False)
        release([behind, beside])
        plain.update(point)
    assert behind._pass.offload is not None and behind._pass.means == (behind, beside)
    copied = copy.deepcopy(behind)  # of a finished update
    assert all(torch.equal(copied.value()[name], tensor) for name, tensor in plain.value().items())
    assert all(torch.equal(behind.value()[name], tensor) for name, tensor in plain.value().items())
    close(beside.value(), combine(points, [1 / 9] * 9), 1e-6)
    again = KINDS[kind]()
    again.load_state_dict(behind.state_dict())
    again.update(points[3])
    behind.update(points[3])
    assert all(torch.equal(again.value()[name], tensor) for name, tensor in behind.value().items())


def test_an_error_in_the_background_is_raised_at_the_next_use():
    class Fails(SWA):
        def _apply(self, *_):
            raise MemoryError("full")

    average = Fails(background=True)
    average.update({"w": torch.ones(2)})
    with pytest.raises(MemoryError, match="full"):
        average.value()


def test_only_averages_away_from_the_weights_are_updated_in_the_background():
    cpu, elsewhere = torch.ones(1), torch.ones(1, device="meta")
    assert not EMA()._behind(elsewhere) and not EMA(device="cpu")._behind(cpu)
    assert EMA(device="cpu")._behind(elsewhere) and not EMA(device="cpu", background=False)._behind(elsewhere)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_restored_averages_continue_to_the_last_bit(kind, stop):
    points = trajectory(9, torch.float32)
    whole, part = KINDS[kind](), KINDS[kind]()
    run(whole, points)
    run(part, points[:stop])
    again = KINDS[kind]()
    again.load_state_dict(copy.deepcopy(part.state_dict()))
    run(part, trajectory(2, torch.float32, seed=9))  # the copy has no part in what happens to the original
    run(again, points[stop:])
    assert all(torch.equal(again.value()[name], tensor) for name, tensor in whole.value().items())
    assert again.count == whole.count


@pytest.mark.parametrize("group", [64, 1 << 17])
def test_one_pass_gives_the_bits_of_separate_updates(monkeypatch, group):
    points = trajectory(8, torch.float32)
    apart = {kind: make() for kind, make in KINDS.items()}
    for average in apart.values():
        run(average, points)
    together = {
        kind: make(covers=(lambda name: name != "big") if kind == "swa" else None) for kind, make in KINDS.items()
    }
    monkeypatch.setattr(mean_module, "GROUP", group)
    for point in points:
        update(list(together.values()), point)
    for kind, average in together.items():
        if group == 64 and kind == "lawa":
            continue  # the parts of a large tensor take turns in being recomputed
        for name, tensor in average.value().items():
            assert torch.equal(tensor, apart[kind].value()[name]), (kind, name)
    assert "big" not in together["swa"].value()


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=12),
    shift=st.floats(-10, 10),
    scale=st.floats(-4, 4),
    kind=st.sampled_from(sorted(set(KINDS) - {"ema-bfloat16"})),
)
def test_averages_are_affine_and_stay_within_their_points(values, shift, scale, kind):
    def average(numbers):
        made = KINDS[kind](dtype="float64")
        return float(run(made, [{"w": torch.tensor([x], dtype=torch.float64)} for x in numbers])["w"])

    plain = average(values)
    assert min(values) - 1e-9 <= plain <= max(values) + 1e-9
    assert average([scale * x + shift for x in values]) == pytest.approx(scale * plain + shift, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 10**7), decay=st.floats(0.5, 1 - 1e-9), interval=st.integers(1, 1000))
def test_ema_weights_stay_between_their_limits(count, decay, interval):
    weight = ema_weight(count, decay, interval=interval)
    assert -math.expm1(interval * math.log(decay)) - 1e-15 <= weight <= 1.0
    assert weight >= 1 / (count + 1) - 1e-12, "never below the equal mean's"


def test_a_tensor_that_was_constant_joins_exactly():
    points = trajectory(9)
    for kind in ("ema", "swa", "lawa", "power"):
        constant = points[0]["big"]
        average, whole = KINDS[kind](), KINDS[kind]()
        for number, point in enumerate(points):
            late = {**point, "big": constant if number < 5 else point["big"]}
            whole.update(late)
            if number == 5:
                average.admit("big", constant)
            average.update({n: t for n, t in late.items() if n != "big"} if number < 5 else late)
        close(average.value(), whole.value(), 1e-12)


def test_integer_and_tied_tensors():
    shared = torch.ones(3)
    average = SWA()
    average.update({"a": shared, "b": shared, "steps": torch.tensor(3)})
    assert list(average.value()) == ["a"]


def test_half_precision_weights_are_averaged_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        points = trajectory(10, dtype)
        found = run(EMA(0.9), points)
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        close(found, combine(points, [0.9 ** (9 - i) * 0.1 / (1 - 0.9**10) for i in range(10)]), 1e-5)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact():
    source = torch.full((200_000,), 1.0 + 1 / 512)  # a quarter of the way from 1 to the next bfloat16
    target = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically_(target, source, noise_like(source, torch.Generator().manual_seed(0)))
    assert set(target.unique().tolist()) == {1.0, 1.0078125}
    assert float(target.float().mean()) == pytest.approx(float(source[0]), abs=2e-5)
    special = torch.tensor([0.0, -1.5, float("inf"), float("-inf"), float("nan"), 3e38])
    target = torch.empty_like(special, dtype=torch.bfloat16)
    round_stochastically_(target, special, noise_like(special, torch.Generator().manual_seed(0)))
    assert target[:4].tolist() == special[:4].tolist() and torch.isnan(target[4])


def test_rounding_side_by_side_gives_the_bits_of_one_by_one(monkeypatch):
    class SideBySide(EMA):  # as on a GPU
        def _apply_rounded(self, index, mean, theta):
            self._apply_rounded_at_once([name for name, _ in self._pass.entries[index]], mean, theta)

    points = trajectory(6, torch.float32)
    wanted = run(KINDS["ema-bfloat16"](), points)
    for at_once in (1, 100, 1 << 22):
        monkeypatch.setattr(lerp_module, "AT_ONCE", at_once)
        found = run(SideBySide(0.9, dtype="bfloat16"), points)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_complex_weights():
    points = [{"w": torch.tensor([complex(i, -i)])} for i in range(4)]
    torch.testing.assert_close(run(SWA(), points)["w"], torch.tensor([complex(1.5, -1.5)]))


def test_plain_functions_do_the_same():
    points = trajectory(12)
    for average, function in (
        (EMA(0.9), lambda a, p, n: ema_update_(a, p, n, 0.9)),
        (SWA(), swa_update_),
        (PowerEMA(0.1), lambda a, p, n: power_update_(a, p, n, 0.1)),
    ):
        plain = {name: torch.empty_like(tensor).zero_() for name, tensor in points[0].items()}
        for number, point in enumerate(points):
            function(plain, point, number)
        close(plain, run(average, points))


def test_a_swap_refuses_what_it_would_leave_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(WeightsError, match=r"no tensor 'module\.0\.weight'.*0\.weight"),
        averaged(model, {f"module.{name}": tensor for name, tensor in before.items()}),
    ):
        pass
    with pytest.raises(WeightsError, match="shape"), averaged(model, {"0.bias": torch.zeros(3)}):
        pass
    with averaged(model, {name: torch.full_like(tensor, 7.0) for name, tensor in before.items()}):  # tied names too
        assert all(bool((tensor == 7).all()) for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_moved_or_changed_are_noticed():
    average = SWA()
    average.update({"w": torch.ones(2)})
    average.update({"w": torch.full((2,), 3.0)})  # another tensor of the same name
    assert average.value()["w"].tolist() == [2.0, 2.0]
    with pytest.raises(WeightsError, match=r"new \['v'\], gone \['w'\]"):
        average.update({"v": torch.ones(2)})
    with pytest.raises(WeightsError, match="shape"):
        average.update({"w": torch.ones(3)})
    assert average.count == 2 and average.value()["w"].tolist() == [2.0, 2.0]
    with pytest.raises(WeightsError, match="holds nothing yet"):
        SWA().value()
    with pytest.raises(ConfigError, match="of a SWA average"):
        EMA().load_state_dict(average.state_dict())
    with pytest.raises(ConfigError, match="k=3"):
        LAWA(2).load_state_dict(run(LAWA(3), trajectory(3)) and LAWA(3).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_a_group(dtype):
    weights = {"w": torch.ones(4_000_000, dtype=dtype)}
    averages = [EMA(0.9), LAWA(2), EMA(0.9, dtype="bfloat16")]
    for _ in range(3):
        update(averages, weights)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        update(averages, weights)
    assert max(abs(event.cpu_memory_usage) for event in profile.function_events) <= 8 * mean_module.GROUP
