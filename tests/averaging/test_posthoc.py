"""Post-hoc reconstruction against averages that were really kept, and the folder of snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soups.averaging import EMA, SWA, Exponential, PostHoc, Power, PowerEMA, Snapshots, Window
from soups.averaging.posthoc import BINS, solve
from soups.errors import ConfigError, DataError, StorageError

STEPS = 600


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random walk with two tracked profiles, snapshotted every 15 steps, and the true averages of its points."""
    folder = tmp_path_factory.mktemp("posthoc")
    snapshots, tracked = Snapshots(folder), {s: PowerEMA(s) for s in (0.05, 0.10)}
    draw = torch.Generator().manual_seed(0)
    weights, points = torch.zeros(200, dtype=torch.float64), []
    for step in range(1, STEPS + 1):
        weights = weights + torch.randn(200, generator=draw, dtype=torch.float64)
        points.append(weights)
        for sigma, average in tracked.items():
            average.update({"w": weights})
            if step % 15 == 0:
                snapshots.save(
                    f"posthoc@{sigma}", step, average.value(), gamma=average.gamma, count=average.count, interval=1
                )
    return PostHoc(folder), points


def true(points, profile):
    shares = np.diff(profile.share(np.arange(STEPS + 1, dtype=float)))
    assert shares.sum() == pytest.approx(1)
    return sum(float(share) * point for share, point in zip(shares, points, strict=True))


@pytest.mark.parametrize(
    ("profile", "residual", "error"),
    [
        (Power(0.05, STEPS), 1e-6, 1e-6),  # it was tracked
        (Power(0.07, STEPS), 0.01, 0.01),
        (Power(0.15, STEPS), 0.01, 0.01),
        (Power(0.20, 450), 0.02, 0.02),
        (Exponential.of(STEPS, half_life=60), 0.05, 0.03),
        (Window(STEPS, 200), 0.4, 0.08),  # a sharp edge is the hardest
    ],
)
def test_reconstruction(run, profile, residual, error):
    posthoc, points = run
    made = posthoc.synthesize(profile)
    wanted = true(points, profile)
    spread = torch.stack(points).std()
    assert made.fit.residual < residual
    assert float((made.weights["w"] - wanted).norm() / (spread * 200**0.5)) < error
    assert made.fit.coefficients.sum() == pytest.approx(1)


def test_profiles_are_the_averages(run):
    _, points = run
    for average, profile in (
        (PowerEMA(0.1), Power(0.1, STEPS)),
        (EMA(0.99), Exponential(0.99, STEPS)),
    ):
        for point in points:
            average.update({"w": point})
        torch.testing.assert_close(average.value()["w"], true(points, profile), rtol=1e-9, atol=1e-9)
    window = SWA()
    for point in points[-31::10]:
        window.update({"w": point})
    torch.testing.assert_close(window.value()["w"], true(points, Window(STEPS, 4, 10)))


def test_long_runs_are_binned_without_harm():
    def basis(end):
        return [Power(s, t) for s in (0.05, 0.1) for t in np.linspace(end / 40, end, 40).astype(int)]

    short, long = basis(BINS), basis(10 * BINS)
    assert solve(long, Power(0.15, 10 * BINS)).residual == pytest.approx(
        solve(short, Power(0.15, BINS)).residual, rel=0.1
    )


def test_sweep_chooses_by_score(run):
    posthoc, points = run
    wanted = true(points, Power(0.12, STEPS))
    profiles = [Power(s, STEPS) for s in (0.05, 0.08, 0.12, 0.2)]
    best, rows = posthoc.sweep(profiles, lambda weights: float((weights["w"] - wanted).norm()))
    assert best.profile == profiles[2] and [row[0] for row in rows] == profiles
    worst, _ = posthoc.sweep(profiles, lambda weights: float((weights["w"] - wanted).norm()), higher_is_better=True)
    assert worst.profile == profiles[3]


def test_errors(run, tmp_path):
    posthoc, _ = run
    with pytest.raises(ConfigError, match="last snapshot was taken at step 600"):
        posthoc.fit(Power(0.1, 601))
    with pytest.raises(DataError, match="holds no snapshots"):
        PostHoc(tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        Window(10, 20)


def test_snapshots_are_whole_listed_and_dropped(tmp_path):
    snapshots = Snapshots(tmp_path / "s", dtype="bfloat16")
    weights = {"w": torch.randn(3), "n": torch.tensor(4)}
    for step in (10, 20, 100):
        snapshots.save("raw", step, weights)
    assert [s.step for s in snapshots.list()] == [10, 20, 100]
    loaded = snapshots.load("raw", 20)
    assert torch.equal(loaded["w"], weights["w"].bfloat16()) and loaded["n"] == 4
    with pytest.raises(DataError, match="raw at 10, raw at 20, raw at 100"):
        snapshots.load("raw", 30)
    assert snapshots.drop_after(15) == 2 and [s.step for s in snapshots.list()] == [10]
    path = snapshots.list()[0].path
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StorageError):
        snapshots.list()
