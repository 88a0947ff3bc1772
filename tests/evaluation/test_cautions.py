"""Each caution is raised where its rule says, and only there."""

import math

import pytest
import torch

from soups.evaluation.cautions import (
    averaged_statistics,
    different_basins,
    different_heads,
    equal_weights,
    noisy_choice,
    one_kept,
    small_split,
    statistics_gaps,
    unshared_tensors,
)


def test_a_held_out_split_of_ten_images() -> None:
    found = small_split(9, 10)
    assert found is not None and found.kind == "small-split"
    assert "10 samples" in found.message and "59.6% to 98.2%" in found.message
    assert small_split(10, 10) is not None, "also when all ten are right"
    assert small_split(1470, 1500) is None


def test_a_choice_among_equals_is_noise_and_a_clear_one_is_not() -> None:
    source = torch.Generator().manual_seed(0)
    equal = (torch.rand(32, 100, generator=source) < 0.8).double()
    found = noisy_choice(equal)
    assert found is not None and found.kind == "noisy-choice" and "small for 32 candidates" in found.message
    assert found.numbers["expected"] > 0.5 * found.numbers["lead"]
    clear = torch.stack([torch.rand(5000, generator=source) < p for p in (0.6, 0.7, 0.9)]).double()
    assert noisy_choice(clear) is None
    same = noisy_choice(torch.ones(4, 50))
    assert same is not None and "all have the same score" in same.message
    assert noisy_choice(torch.ones(1, 50)) is None


def test_all_but_one_rejected() -> None:
    found = one_kept(1, 8)
    assert found is not None and "all 7 others were rejected" in found.message
    assert one_kept(2, 8) is None and one_kept(1, 1) is None


def test_barriers_above_the_threshold() -> None:
    found = different_basins({("a", "b"): 0.01, ("a", "c"): 0.3, ("b", "c"): 0.4})
    assert found is not None and "2 of 3 pairs" in found.message and "between b and c" in found.message
    assert different_basins({("a", "b"): 0.02}) is None
    assert different_basins({("a", "b"): float("nan")}) is not None, "an average that gives NaN is no shared basin"


def models(seed: int, shift: float) -> dict[str, torch.Tensor]:
    body = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    head = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
    return {"body.weight": body + shift * noise, "head.weight": head, "head.bias": torch.zeros(10)}


def test_heads_of_separate_initialisation_are_found() -> None:
    assert unshared_tensors(models(1, 0.1), models(2, 0.1)) == ["head.weight"]
    assert unshared_tensors(models(1, 0.1), models(1, 0.2)) == []
    strangers = {name: torch.randn_like(tensor) for name, tensor in models(1, 0).items()}
    assert unshared_tensors(models(1, 0.1), strangers) == [], "no shared start at all is another matter"
    found = different_heads({"b": ["head.weight"], "c": []})
    assert found is not None and "1 of 2 ingredients do not share 'head.weight'" in found.message
    assert different_heads({"b": [], "c": []}) is None


def test_the_same_weights_twice() -> None:
    found = equal_weights({"a": "x", "b": "y", "c": "x"})
    assert found is not None and "a = c" in found.message and found.numbers["groups"] == 1
    assert equal_weights({"a": "x", "b": "y"}) is None


@pytest.mark.parametrize("count", [1, 3])
def test_tiny_splits_do_not_fail(count: int) -> None:
    assert small_split(count, count) is not None


def statistics(mean: float, variance: float) -> dict[str, torch.Tensor]:
    """Of a layer of two channels, the second at rest: mean 0, variance 1."""
    return {
        "conv.weight": torch.ones(3), "bn.running_mean": torch.tensor([mean, 0.0]),
        "bn.running_var": torch.tensor([variance, 1.0]), "bn.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip


def test_averages_of_batchnorm_statistics() -> None:
    first = statistics(0, 4)
    # A shift of half a standard deviation in one of two channels; a variance four times as large, a deviation twice.
    assert statistics_gaps(first, statistics(1, 4)) == {"bn": pytest.approx((0.5**2 / 2) ** 0.5, rel=1e-5)}
    assert statistics_gaps(first, statistics(0, 16)) == {"bn": pytest.approx(math.log(2) / 2**0.5, rel=1e-4)}
    assert statistics_gaps({}, first) == {} and statistics_gaps(first, {}) == {}
    plain = {"running_mean": torch.zeros(1), "running_var": torch.ones(1)}  # a layer that is the whole network
    assert statistics_gaps(plain, plain) == {"": 0.0}
    gaps = {"a": statistics_gaps(first, first), "b": statistics_gaps(first, statistics(1, 4))}
    found = averaged_statistics(gaps, (0.25, 0.75))
    assert found is not None and found.kind == "batchnorm"
    assert "0.35 standard deviations (layer 'bn' of b)" in found.message
    assert "accuracy of 25.0%; with measured ones, 75.0%. soup.batchnorm=reestimate" in found.message
    assert found.numbers == {"largest": gaps["b"]["bn"], "ingredients": 1.0, "averaged": 0.25, "measured": 0.75}
    assert averaged_statistics({"a": gaps["a"]}) is None
    assert averaged_statistics({"b": statistics_gaps(first, statistics(0.02, 4))}) is None, "rounding"
    assert averaged_statistics({"b": {"bn": float("nan")}}) is not None
