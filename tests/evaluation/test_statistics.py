"""Intervals and tests against SciPy, exact enumeration and simulation with known truth."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from soups.errors import ConfigError, DataError
from soups.evaluation.statistics import (
    best_single,
    bootstrap_interval,
    choice_noise,
    compare_accuracy,
    compare_losses,
    expected_maximum,
    losses,
    mean_interval,
    mean_over_splits,
    negative_flips,
    right,
    selection_effect,
    wilson,
)


def flags(*counts: tuple[bool, int]) -> torch.Tensor:
    return torch.tensor([flag for flag, count in counts for _ in range(count)])


def pair(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    ours = flags((True, both + gained), (False, lost + neither))
    theirs = flags((True, both), (False, gained), (True, lost), (False, neither))
    return ours, theirs


def test_per_sample_numbers_average_to_the_scores() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    assert right(logits, labels).dtype == torch.bool
    reference = -logits.double().log_softmax(1)[torch.arange(50), labels]
    assert torch.allclose(losses(logits, labels), reference, rtol=1e-14)
    with pytest.raises(DataError, match="same samples"):
        right(logits, labels[:3])


@given(count=st.integers(1, 400), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(count: int, share: float, level: float) -> None:
    found = wilson(round(share * count), count, level)
    expected = stats.binomtest(round(share * count), count).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value in found and 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize(("right_ones", "count"), [(3, 2), (-1, 5), (0, 0)])
def test_wilson_refuses_what_cannot_be(right_ones: int, count: int) -> None:
    with pytest.raises(DataError):
        wilson(right_ones, count)


def test_mean_interval_is_the_textbooks_and_bootstrap_agrees() -> None:
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=2000))
    found = mean_interval(values, 0.9)
    low, high = stats.norm.interval(0.9, values.numpy().mean(), stats.sem(values.numpy()))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    again = bootstrap_interval(values, 0.9, resamples=4000, seed=1)
    assert (again.low, again.high) == pytest.approx((low, high), abs=0.1 * found.half_width)
    assert again == bootstrap_interval(values, 0.9, resamples=4000, seed=1)
    assert again != bootstrap_interval(values, 0.9, resamples=4000, seed=2)


def test_bootstrap_against_its_exact_distribution() -> None:
    """Of three samples all 27 resamples can be listed."""
    values = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)
    every = [sum(draw) / 3 for draw in itertools.product(values.tolist(), repeat=3)]
    expected = np.quantile(every, [0.2, 0.8])
    found = bootstrap_interval(values, 0.6, resamples=20001, seed=0)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_values_without_an_interval_are_refused() -> None:
    with pytest.raises(DataError, match="at least two"):
        mean_interval(torch.ones(1))
    with pytest.raises(DataError, match="1 of 3"):
        bootstrap_interval(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        wilson(1, 2, level=95)


@given(gained=st.integers(0, 60), lost=st.integers(0, 60), alternative=st.sampled_from(["two-sided", "greater"]))
@settings(max_examples=80, deadline=None)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, alternative: str) -> None:
    found = compare_accuracy(*pair(40, gained, lost, 10), alternative=alternative)  # type: ignore[arg-type]
    if gained + lost:
        expected = stats.binomtest(gained, gained + lost, 0.5, alternative=alternative).pvalue
        assert found.p_value == pytest.approx(expected, rel=1e-9)
    else:
        assert found.p_value == 1.0
    assert (found.gained, found.lost, found.count) == (gained, lost, 50 + gained + lost)
    assert found.difference.value == pytest.approx((gained - lost) / found.count)
    assert found.difference.value in found.difference


@given(gained=st.integers(0, 30), lost=st.integers(0, 30), both=st.integers(1, 200), level=st.sampled_from([0.8, 0.95]))
@settings(max_examples=40, deadline=None)
def test_the_ends_of_tangos_interval_are_just_not_rejected(gained: int, lost: int, both: int, level: float) -> None:
    """At each end the score statistic, with the likelihood maximised numerically, equals z."""
    count = gained + lost + both
    interval = compare_accuracy(*pair(both, gained, lost, 0), level=level).difference
    z = stats.norm.ppf(0.5 + level / 2)
    for delta in (interval.low, interval.high):
        if abs(delta) > 1 - 1e-9:
            continue

        def minus_log_likelihood(q: float, delta: float = delta) -> float:
            terms = ((gained, q + delta), (lost, q), (both, 1 - 2 * q - delta))
            return -sum(n * math.log(max(p, 1e-300)) for n, p in terms if n)

        bounds = (max(0.0, -delta), (1 - delta) / 2)
        q = optimize.minimize_scalar(minus_log_likelihood, bounds=bounds, options={"xatol": 1e-13}).x
        statistic = (gained - lost - count * delta) / math.sqrt(count * (2 * q + delta * (1 - delta)))
        assert abs(statistic) == pytest.approx(z, rel=2e-3)


def test_agreement_everywhere_still_leaves_doubt() -> None:
    same = pair(90, 0, 0, 10)
    found = compare_accuracy(*same)
    z = stats.norm.ppf(0.975)
    assert found.difference.high == pytest.approx(z * z / (100 + z * z)), "closed form for no discordant pair"
    assert found.difference.low == pytest.approx(-found.difference.high)
    assert found.p_value == 1.0


def test_tangos_interval_covers_as_often_as_it_says() -> None:
    """4000 pairs of models with a known difference of 3 points on 300 samples."""
    source = np.random.default_rng(3)
    table = source.multinomial(300, [0.06, 0.03, 0.91], size=4000)
    inside = 0
    cache: dict[tuple[int, int], bool] = {}
    for gained, lost, both in table.tolist():
        if (gained, lost) not in cache:
            cache[gained, lost] = 0.03 in compare_accuracy(*pair(both, gained, lost, 0)).difference
        inside += cache[gained, lost]
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)


def test_losses_compare_in_pairs() -> None:
    source = torch.Generator().manual_seed(0)
    reference = torch.rand(400, generator=source, dtype=torch.float64) * 5
    challenger = reference - 0.05 + 0.2 * torch.randn(400, generator=source, dtype=torch.float64)
    found = compare_losses(challenger, reference, resamples=3000, seed=4)
    expected = stats.ttest_rel(reference, challenger)
    assert found.difference.value == pytest.approx(float((reference - challenger).mean()))
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.004)
    interval = expected.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), abs=0.003)
    greater = compare_losses(challenger, reference, alternative="greater", resamples=3000)
    worse = compare_losses(reference, challenger, alternative="greater", resamples=3000)
    assert greater.p_value < 0.01 and worse.p_value > 0.99
    same = compare_losses(reference, reference)
    assert same.p_value == 1.0 and same.difference.value == 0
    with pytest.raises(ConfigError, match="did you mean 'greater'"):
        compare_losses(reference, reference, alternative="great")  # type: ignore[arg-type]


def test_sign_flips_of_three_samples_are_exact() -> None:
    """All eight sets of signs of (1, 2, 3): the sum 6 or -6 comes up in 2 of 8."""
    found = compare_losses(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), resamples=20000)
    assert found.p_value == pytest.approx(0.25, abs=0.012)


def test_negative_flips() -> None:
    old, new = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 0, 1, 0]).bool()
    found = negative_flips(old, new)
    assert found.value == 0.4 and found == wilson(2, 5)


def test_means_over_splits_keep_images_together() -> None:
    source = torch.Generator().manual_seed(0)
    shared = torch.rand(100, generator=source) < 0.8
    other = torch.rand(50, generator=source) < 0.5
    repeated = mean_over_splits([torch.stack([shared, shared, shared])])
    single = mean_interval(shared.double())
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high)), "copies add no certainty"
    both = mean_over_splits([torch.stack([shared, shared]), other])
    assert both.value == pytest.approx((2 * float(shared.double().mean()) + float(other.double().mean())) / 3)
    a, b = mean_interval(shared.double()), mean_interval(other.double())
    assert both.half_width == pytest.approx(math.hypot(2 / 3 * a.half_width, 1 / 3 * b.half_width))


def test_expected_maximum_in_closed_form() -> None:
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    table = np.random.default_rng(0).standard_normal((20000, 32)).max(1)
    assert expected_maximum(32) == pytest.approx(table.mean(), abs=0.02)


def equal_models(worlds: int, models: int, count: int) -> torch.Tensor:
    """Models of one true accuracy, 0.8, on samples of unequal difficulty: (worlds, models, count)."""
    source = torch.Generator().manual_seed(7)
    difficulty = 0.6 + 0.4 * torch.rand(worlds, 1, count, generator=source)
    return (torch.rand(worlds, models, count, generator=source) < difficulty).double()


def test_choice_noise_is_what_chance_gives() -> None:
    worlds = equal_models(300, 8, 200)
    noise = [choice_noise(world) for world in worlds]
    expected = sum(item.expected for item in noise) / 300
    lead = sum(item.lead for item in noise) / 300
    assert lead == pytest.approx(expected, rel=0.05)
    one = noise[0]
    assert one.samples_needed == pytest.approx(200 * (2 * one.expected / one.lead) ** 2)


def test_the_selection_effect_lies_between_its_two_estimates() -> None:
    """Equal models: reported minus true is the lead at that size; halves see √2 of it, the bootstrap 1/√2."""
    worlds = equal_models(60, 8, 200)
    truth = float((equal_models(2000, 8, 200).mean(2).max(1).values - 0.8).mean())
    on_halves = float((equal_models(2000, 8, 100).mean(2).max(1).values - 0.8).mean())

    def average(method: str) -> float:
        effects = [selection_effect(best_single(w), 200, method, 60, seed=1).optimism.value for w in worlds]  # type: ignore[arg-type]
        return sum(effects) / len(effects)

    split, bootstrap = average("split"), average("bootstrap")
    assert split == pytest.approx(on_halves, rel=0.1), "without bias at half the size"
    assert split == pytest.approx(math.sqrt(2) * truth, rel=0.15)
    assert bootstrap == pytest.approx(truth / math.sqrt(2), rel=0.15)


def test_a_clear_winner_has_no_selection_effect() -> None:
    scores = torch.zeros(3, 40)
    scores[1] = 1
    effect = selection_effect(best_single(scores), 40)
    assert effect.optimism.value == 0 and effect.reported == effect.true == 1
    assert (effect.samples, effect.rounds, effect.method) == (20, 200, "split")
    assert effect == selection_effect(best_single(scores), 40)


def test_selection_effect_mistakes() -> None:
    with pytest.raises(DataError, match="at least 4"):
        selection_effect(best_single(torch.ones(2, 3)), 3)
    with pytest.raises(ConfigError, match="did you mean 'bootstrap'"):
        selection_effect(best_single(torch.ones(2, 8)), 8, "bootstrp")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least two models"):
        choice_noise(torch.ones(1, 8))
