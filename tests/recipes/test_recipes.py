"""Greedy and uniform soups against a plain reimplementation, the tie rules, and how often ingredients are read."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError, WeightsError
from soups.recipes import Candidate, greedy, uniform


def candidates(points: list[list[float]], target: torch.Tensor, reads: Counter | None = None) -> list[Candidate]:
    def load(number: int) -> dict[str, torch.Tensor]:
        if reads is not None:
            reads[number] += 1
        return {"w": torch.tensor(points[number], dtype=torch.float64)}

    return [
        Candidate(
            f"m{number}", -float((torch.tensor(point, dtype=torch.float64) - target).norm()), lambda n=number: load(n)
        )
        for number, point in enumerate(points)
    ]


def reference(points: list[list[float]], target: torch.Tensor, strict: bool) -> list[int]:
    """Recipe 1 of the paper, averaging all members anew at each step."""
    table = torch.tensor(points, dtype=torch.float64)
    # The authors sort by (score, place) downwards, so that of equal scores the later comes first.
    places = range(len(points))[:: -1 if strict else 1]
    order = sorted(places, key=lambda i: float((table[i] - target).norm()))
    soup: list[int] = []
    best = -float("inf")
    for number in order:
        value = -float((table[[*soup, number]].mean(0) - target).norm())
        if value > best or (not strict and value == best) or not soup:
            soup.append(number)
            best = value
    return soup


@settings(deadline=None, max_examples=60)
@given(
    points=st.lists(st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=2), min_size=1, max_size=8),
    ties=st.sampled_from(["paper", "official"]),
)
def test_greedy_equals_the_papers_algorithm(points: list[list[float]], ties: str) -> None:
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    reads: Counter = Counter()
    evaluations = 0

    def score(weights) -> float:
        nonlocal evaluations
        evaluations += 1
        return -float((weights["w"] - target).norm())

    soup = greedy(candidates(points, target, reads), score, ties)
    expected = reference(points, target, strict=ties == "official")
    mean = torch.tensor([points[i] for i in expected], dtype=torch.float64).mean(0)
    # A sum and a stacked mean may differ by a rounding; then both must score the same to that rounding.
    if soup.members != [f"m{i}" for i in expected]:
        assert soup.score == pytest.approx(-float((mean - target).norm()), abs=1e-12)
    else:
        assert torch.allclose(soup.weights["w"], mean, rtol=1e-15, atol=1e-15)
    assert set(reads.values()) == {1}, "each ingredient is read once"
    assert evaluations == len(points), "N candidates need N evaluations"
    assert soup.score >= max(candidate.score for candidate in candidates(points, target)) - 1e-12


def test_tie_rules_differ_where_the_score_is_equal() -> None:
    pool = [Candidate(name, 0.9, lambda x=x: {"w": torch.tensor([x])}) for name, x in (("a", 1.0), ("b", 3.0))]
    assert greedy(pool, lambda weights: 0.9, "paper").members == ["a", "b"]
    assert greedy(pool, lambda weights: 0.9, "official").members == ["b"]


def test_among_equal_scores_the_authors_try_the_later_first() -> None:
    own = {"a": 0.8, "b": 0.9, "c": 0.9, "d": 0.9, "e": 0.8}
    pool = [Candidate(name, score, lambda: {"w": torch.zeros(1)}) for name, score in own.items()]
    assert [step.name for step in greedy(pool, lambda weights: 0.0, "paper").steps] == list("bcdae")
    assert [step.name for step in greedy(pool, lambda weights: 0.0, "official").steps] == list("dcbea")


def test_steps_tell_what_happened() -> None:
    pool = [
        Candidate("a", 0.8, lambda: {"w": torch.tensor([1.0])}),
        Candidate("b", 0.9, lambda: {"w": torch.tensor([0.0])}),
    ]
    seen = []
    soup = greedy(pool, lambda weights: 0.9 - weights["w"].item(), on_step=seen.append)
    assert [(step.name, step.kept) for step in soup.steps] == [("b", True), ("a", False)]
    assert soup.steps[1].soup_score == pytest.approx(0.4) and soup.steps[1].to_reach == pytest.approx(0.9)
    assert seen == soup.steps


def test_uniform_is_the_mean_in_any_order() -> None:
    points = [[0.1 * i, -0.3 * i] for i in range(7)]
    pool = candidates(points, torch.zeros(2, dtype=torch.float64))
    first, second = uniform(pool, lambda w: 0.0), uniform(pool[::-1], lambda w: 0.0)
    assert torch.equal(first.weights["w"], second.weights["w"])
    assert torch.allclose(first.weights["w"], torch.tensor(points, dtype=torch.float64).mean(0), rtol=1e-15)
    assert len(first.members) == 7


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="at least one ingredient"):
        greedy([], lambda weights: 0.0)
    with pytest.raises(ConfigError, match="at least one ingredient"):
        uniform([], lambda weights: 0.0)
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        greedy([Candidate("a", 0.0, dict)], lambda weights: 0.0, "papper")  # type: ignore[arg-type]
    odd = [Candidate("a", 1.0, lambda: {"w": torch.zeros(2)}), Candidate("b", 0.0, lambda: {"w": torch.zeros(3)})]
    with pytest.raises(WeightsError, match="b does not fit"):
        greedy(odd, lambda weights: 0.0)
