"""Removal, weights, top-k, lines and BCWI against closed forms and plain reimplementations, on synthetic scores."""

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soups.errors import ConfigError, WeightsError
from soups.recipes import (
    RECIPES,
    Candidate,
    bcwi,
    diwa,
    greedy,
    greedy_removal,
    greedy_weights,
    interpolation,
    top_k,
    uniform,
    wise_ft,
)
from soups.recipes.bcwi import fisher_line
from soups.weights import RunningSum

Points = list[list[float]]


def candidate(name: str, point: Sequence[float], score: float = 0.0) -> Candidate:
    return Candidate(name, score, lambda: {"w": torch.tensor(point, dtype=torch.float64)})


def closeness(target: Tensor) -> Callable[..., float]:
    return lambda weights: -float((weights["w"] - target).norm())


def pool_of(points: Points, target: Tensor) -> list[Candidate]:
    score = closeness(target)
    made = [candidate(f"m{number}", point) for number, point in enumerate(points)]
    return [Candidate(one.name, score(one.load()), one.load) for one in made]


TARGET = torch.tensor([1.0, -2.0], dtype=torch.float64)
POINTS = st.lists(st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=2), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(points=POINTS)
def test_removal_ends_where_no_single_removal_helps(points: Points) -> None:
    score = closeness(TARGET)
    pool = pool_of(points, TARGET)
    soup = greedy_removal(pool, score)
    assert soup.score >= greedy(pool, score).score - 1e-12
    table = {one.name: one.load()["w"] for one in pool}
    mean = torch.stack([table[name] for name in soup.members]).mean(0)
    assert torch.allclose(soup.weights["w"], mean, atol=1e-12)
    if len(soup.members) > 1:
        for rest in combinations(soup.members, len(soup.members) - 1):
            assert score({"w": torch.stack([table[name] for name in rest]).mean(0)}) <= soup.score + 1e-9
    assert sum(soup.coefficients.values()) == pytest.approx(1)


def test_removal_takes_out_an_early_member_that_a_later_one_makes_superfluous() -> None:
    """Scores by set: greedy keeps a, b, c; without a the other two are best."""
    worth = {"a": 0.50, "ab": 0.60, "abc": 0.70, "bc": 0.90, "ac": 0.1, "b": 0.2, "c": 0.2, "": 0.0}
    pool = [
        Candidate("a", 0.5, lambda: {"w": torch.tensor([1.0, 0, 0])}),
        Candidate("b", 0.4, lambda: {"w": torch.tensor([0, 1.0, 0])}),
        Candidate("c", 0.3, lambda: {"w": torch.tensor([0, 0, 1.0])}),
    ]

    def score(weights) -> float:
        return worth["".join(name for name, value in zip("abc", weights["w"].tolist(), strict=True) if value > 0)]

    assert greedy(pool, score).members == ["a", "b", "c"]
    soup = greedy_removal(pool, score)
    assert soup.members == ["b", "c"] and soup.score == 0.90
    assert [(s.name, s.action, s.kept) for s in soup.steps[3:]] == [("a", "remove", True), ("b", "remove", False)]
    assert torch.equal(soup.weights["w"], torch.tensor([0, 0.5, 0.5]))


@settings(deadline=None, max_examples=60)
@given(points=POINTS)
def test_forward_selection_equals_a_plain_loop(points: Points) -> None:
    score = closeness(TARGET)
    pool = pool_of(points, TARGET)
    soup = greedy_weights(pool, score)
    order = sorted(range(len(points)), key=lambda i: -pool[i].score)
    table = torch.tensor(points, dtype=torch.float64)
    counts = torch.zeros(len(points), dtype=torch.float64)
    counts[order[0]] = 1
    best = score({"w": table[order[0]]})
    for _ in range(len(points)):
        trials = [score({"w": (counts @ table + table[i]) / (counts.sum() + 1)}) for i in order]
        if max(trials) <= best:
            break
        best = max(trials)
        counts[order[trials.index(best)]] += 1
    # Ties that differ by a rounding may go either way; the score they lead to may not.
    assert soup.score == pytest.approx(best, abs=1e-9)
    mixed = sum(share * table[int(name[1:])] for name, share in soup.coefficients.items())
    assert torch.allclose(soup.weights["w"], mixed, atol=1e-12)
    assert soup.score >= pool[order[0]].score


def test_weights_of_forward_selection_are_counts() -> None:
    target = torch.tensor([1.0], dtype=torch.float64)
    pool = pool_of([[0.0], [3.0]], target)
    soup = greedy_weights(pool, closeness(target), rounds=10)
    assert soup.coefficients == {"m0": 2 / 3, "m1": 1 / 3} and soup.score == 0
    assert [(step.name, step.kept) for step in soup.steps] == [("m0", True), ("m1", True), ("m0", True), ("m0", False)]
    assert greedy_weights(pool, closeness(target), rounds=0).members == ["m0"]
    stuck = pool_of([[0.0], [4.0]], target)
    assert greedy_weights(stuck, closeness(target)).members == ["m0"], "an equal score is no reason to go on"


def test_top_k_averages_the_best_and_chooses_the_largest_of_equal_k() -> None:
    target = torch.tensor([0.0], dtype=torch.float64)
    pool = pool_of([[1.0], [-1.5], [2.0], [10.0]], target)
    assert top_k(pool, closeness(target), k=3).weights["w"].item() == pytest.approx(0.5)
    chosen = top_k(pool, closeness(target))
    assert chosen.members == ["m0", "m1"] and chosen.weights["w"].item() == pytest.approx(-0.25)
    assert top_k(pool, lambda weights: 0.0).details == {"k": 4}
    with pytest.raises(ConfigError, match="k=5 must be between 1 and the number of ingredients, 4"):
        top_k(pool, lambda weights: 0.0, k=5)


def test_diwa_is_uniform_or_greedy_with_equal_scores_kept() -> None:
    pool = pool_of([[1.0, -2.0], [1.5, -2.0], [9.0, 9.0]], TARGET)
    assert torch.equal(diwa(pool, closeness(TARGET), "uniform").weights["w"], uniform(pool, lambda w: 0).weights["w"])
    assert diwa(pool, lambda weights: 1.0).members == ["m0", "m1", "m2"], "restricted keeps at equal scores"
    with pytest.raises(ConfigError, match="no selection 'restrict'"):
        diwa(pool, closeness(TARGET), "restrict")


@settings(deadline=None, max_examples=40)
@given(alpha=st.floats(0, 1), a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_a_line_is_a_convex_combination(alpha: float, a: float, b: float) -> None:
    start, pool = candidate("start", [a]), [candidate("end", [b], 1.0)]
    soup = wise_ft(pool, lambda weights: 0.0, start, alpha=alpha, points=3)
    assert soup.weights["w"].item() == pytest.approx((1 - alpha) * a + alpha * b, abs=1e-12)
    assert soup.coefficients == {"start": 1 - alpha, "end": alpha}
    old = bcwi(pool, lambda weights: 0.0, start, lambda weights: torch.zeros(2, 2), torch.zeros(2).long(), alpha=alpha)
    assert old.weights["w"].item() == pytest.approx(alpha * a + (1 - alpha) * b, abs=1e-12)
    assert {point.position for point in soup.path} == {0.0, 0.5, 1.0, alpha}


def test_wise_ft_chooses_on_the_line_and_reports_all_of_it() -> None:
    start = candidate("start", [0.0, 0.0])
    pool = [candidate("a", [2.0, 0.0], 0.9), candidate("b", [0.0, 2.0], 0.8)]
    target = torch.tensor([0.6, 0.0], dtype=torch.float64)
    soup = wise_ft(pool, closeness(target), start)
    assert soup.details == {"alpha": 0.3, "end": "best"} and soup.members == ["a"]
    assert soup.weights["w"].tolist() == pytest.approx([0.6, 0.0])
    assert [point.position for point in soup.path] == [round(0.1 * n, 1) for n in range(11)]
    assert [point.score for point in soup.path] == pytest.approx([-abs(0.2 * n - 0.6) for n in range(11)])
    assert soup.path[10].load()["w"].tolist() == [2.0, 0.0]
    both = wise_ft(pool, closeness(torch.tensor([1.0, 1.0]).double()), start, end="uniform")
    assert both.details["alpha"] == 1.0 and both.coefficients == {"start": 0.0, "a": 0.5, "b": 0.5}
    flat = wise_ft(pool, lambda weights: 0.0, start)
    assert flat.details["alpha"] == 0.0, "of equally good points the one nearest to the start"
    assert wise_ft(pool, closeness(target), start, end="greedy", points=2).details["end"] == "greedy"


def line_of_predictions(weights) -> Tensor:
    """Four samples of class 0; sample i is right while w < its threshold: 0 below 0.5, 1 below 0.7, 2 from 0.3 on, 3 ever."""
    w = weights["w"].item()
    correct = torch.tensor([w < 0.5, w < 0.7, w >= 0.3, True])
    return torch.stack([correct.double(), 1 - correct.double()], dim=1)


def test_bcwi_takes_the_fewest_negative_flips_that_cost_no_score() -> None:
    """Old at 0 has samples 0, 1 and 3 right, new at 1 has 2 and 3: two of four flip."""
    old, pool = candidate("old", [0.0]), [candidate("new", [1.0], 0.5)]
    labels = torch.zeros(4, dtype=torch.int64)

    def accuracy(weights) -> float:
        return float((line_of_predictions(weights).argmax(1) == labels).double().mean())

    soup = bcwi(pool, accuracy, old, line_of_predictions, labels)
    # α is the old model's share: w = 1 - α. From α = 0.6 on both are right again; at 0.6 and 0.7 sample 2 still is.
    assert soup.details["negative_flip_rate_of_new"] == 0.5
    assert soup.details["alpha"] == 0.6 and soup.details["negative_flip_rate"] == 0.0 and soup.score == 1.0
    assert soup.details["negative_flips"]["0.4"] == 0.25
    assert soup.coefficients == {"start": 0.6, "new": 0.4}
    strict = bcwi(pool, lambda weights: weights["w"].item(), old, line_of_predictions, labels)
    assert strict.details["alpha"] == 0.0, "no score may be lost"
    loose = bcwi(pool, lambda weights: weights["w"].item(), old, line_of_predictions, labels, tolerance=0.45)
    assert loose.details["alpha"] == 0.4


def test_the_fisher_form_is_the_formula() -> None:
    torch.manual_seed(0)
    old, new = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    information = torch.rand(5, dtype=torch.float64)
    pool = [Candidate("new", 1.0, lambda: {"w": new, "steps": torch.tensor(3)})]
    start = Candidate("old", 0.0, lambda: {"w": old, "steps": torch.tensor(9)})
    soup = bcwi(
        pool, lambda weights: 0.0, start, lambda weights: torch.zeros(1, 2), torch.zeros(1).long(),
        fisher=lambda weights: {"w": information}, form="fisher", alpha=0.3,
    )  # fmt: skip
    f = 0.3 * information / information.mean()
    assert torch.allclose(soup.weights["w"], (f * old + 0.7 * new) / (f + 0.7), atol=1e-14)
    assert soup.weights["steps"] == 3, "integers are the new model's"
    ends = fisher_line({"w": new}, {"w": old}, 1.0, {"w": torch.tensor([0.0, 1, 1, 1, 1]).double()})
    assert torch.equal(ends["w"], old), "with nothing to weigh by, the old weight stays"
    equal = fisher_line({"w": new}, {"w": old}, 0.3, {"w": torch.ones(5).double()})
    assert torch.allclose(equal["w"], 0.3 * old + 0.7 * new, atol=1e-15), "F = 1 is the plain form"
    with pytest.raises(ConfigError, match="zero everywhere"):
        bcwi(
            pool, lambda weights: 0.0, start, lambda weights: torch.zeros(1, 2), torch.zeros(1).long(),
            fisher=lambda weights: {"w": torch.zeros(5)}, form="fisher",
        )  # fmt: skip


def test_interpolation_finds_the_point_and_shows_the_barrier() -> None:
    pool = [candidate("a1", [0.0], 0.9), candidate("b1", [1.0], 0.8), candidate("b2", [5.0], 0.1)]
    soup = interpolation(pool, closeness(torch.tensor([0.4]).double()), points=6)
    assert soup.weights["w"].item() == pytest.approx(0.4) and soup.coefficients == {"a1": 0.6, "b1": 0.4}
    far = interpolation(pool, lambda weights: abs(weights["w"].item() - 2.5), between=["a1", "b2"], points=3)
    assert [point.score for point in far.path] == [2.5, 0.0, 2.5]
    with pytest.raises(ConfigError, match="'b' fits 2 ingredients"):
        interpolation(pool, lambda weights: 0.0, between=["a1", "b"])
    with pytest.raises(ConfigError, match="twice"):
        interpolation(pool, lambda weights: 0.0, between=["a1", "a"])
    with pytest.raises(ConfigError, match="needs two ingredients"):
        interpolation(pool[:1], lambda weights: 0.0)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"learned", "bcwi"}))
def test_every_recipe_names_what_does_not_fit_and_needs_one_ingredient(name: str) -> None:
    given = {"start": candidate("start", [0.0])} if name in ("wise_ft", "merge") else {}
    with pytest.raises(ConfigError, match="at least one ingredient"):
        RECIPES[name]([], lambda weights: 0.0, **given)
    odd = [candidate("a", [0.0], 1.0), candidate("odd", [0.0, 1.0], 0.5)]
    if name in ("wise_ft", "merge"):
        given = {"start": candidate("start", [0.0, 0.0])}
    with pytest.raises(WeightsError, match=r"does not fit|odd"):
        RECIPES[name](odd, lambda weights: 0.0, **given)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.floats(-4, 4), min_size=2, max_size=5),
    factors=st.lists(st.integers(1, 5).map(float), min_size=5, max_size=5),
)
def test_weighted_sums_and_taking_one_out(values: list[float], factors: list[float]) -> None:
    models = [{"w": torch.tensor([value], dtype=torch.float64)} for value in values]
    total = RunningSum()
    for model, factor in zip(models, factors, strict=False):
        total.add(model, factor=factor)
    exact = sum(v * f for v, f in zip(values, factors, strict=False)) / sum(factors[: len(values)])
    assert total.mean()["w"].item() == pytest.approx(exact, abs=1e-12)
    rest = sum(v * f for v, f in zip(values[1:], factors[1:], strict=False)) / sum(factors[1 : len(values)])
    assert total.mean_with(models[0], factor=-factors[0])["w"].item() == pytest.approx(rest, abs=1e-12)
    single = RunningSum()
    single.add(models[0])
    with pytest.raises(WeightsError, match="no models"):
        single.mean_with(models[0], factor=-1.0)
