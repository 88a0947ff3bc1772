"""The merge recipe: any method, its coefficients by the held-out score."""

import pytest
import torch

from soups.errors import ConfigError
from soups.merging import make_method
from soups.merging import merge as merge_models
from soups.recipes import Candidate, merge

START = {"w": torch.tensor([0.0, 0.0, 1.0])}
EXPERTS = {"a": {"w": torch.tensor([1.0, 0.0, 1.0])}, "b": {"w": torch.tensor([0.0, 2.0, 1.0])}}


def candidate(name, score=0.0):
    return Candidate(name, score, lambda: EXPERTS[name])


def start():
    return Candidate("start", float("nan"), lambda: START)


def near(scale):
    """A score that is best for task arithmetic of this scale."""
    target = START["w"] + scale * torch.tensor([1.0, 2.0, 0.0])
    return lambda weights: -float((weights["w"] - target).abs().sum())


def test_the_held_out_score_chooses_the_scale():
    soup = merge(
        [candidate("a", 0.1), candidate("b", 0.2)], near(0.4), start(), "task_arithmetic", {"scale": [0.1, 0.4, 0.9]}
    )
    assert soup.weights["w"].tolist() == pytest.approx([0.4, 0.8, 1.0])
    assert soup.members == ["b", "a"] and soup.score == pytest.approx(0, abs=1e-6)
    assert soup.details["parameters"] == {"scale": 0.4} and len(soup.details["trials"]) == 3
    assert soup.note == "task_arithmetic of 2, scale 0.4"


def test_values_by_ingredient_are_lists_in_a_list():
    soup = merge(
        [candidate("a", 1.0), candidate("b")],
        near(1),
        start(),
        "task_arithmetic",
        {"weight": [[1.0, 0.5]], "scale": 1.0},
    )
    assert soup.weights["w"].tolist() == [1, 1, 1]


def test_methods_without_a_base_take_none():
    soup = merge([candidate("a"), candidate("b")], near(1), None, "linear")
    assert soup.weights["w"].tolist() == [0.5, 1.0, 1.0]
    with_start = merge([candidate("a"), candidate("b")], near(1), start(), "median")
    expected = merge_models(make_method("median"), list(EXPERTS.values()))
    assert torch.equal(with_start.weights["w"], expected["w"])


def test_what_cannot_be_merged():
    with pytest.raises(ConfigError, match="at least one ingredient"):
        merge([], near(1), start())
    with pytest.raises(ConfigError, match=r"soup\.start="):
        merge([candidate("a")], near(1))
    with pytest.raises(ConfigError, match="exactly 1 models"):
        merge([candidate("a"), candidate("b")], near(1), start(), "slerp")
