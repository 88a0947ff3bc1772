"""Optimisers without gradients: they find a known optimum, keep their budget, and continue an interrupted search."""

import json
from pathlib import Path

import pytest
import torch

from soups.coefficients import CmaEs, Cobyla, Mixture, Points, Random, search
from soups.errors import ConfigError, StorageError

BASE = {"w": torch.zeros(2, dtype=torch.float64)}
EXPERTS = [{"w": torch.tensor(value, dtype=torch.float64)} for value in ([1.0, 0.0], [0.0, 2.0])]
BEST = torch.tensor([0.6, 0.8], dtype=torch.float64)  # at λ = (0.6, 0.4)


def score(weights) -> float:
    return -float((weights["w"] - BEST).square().sum())


def optimiser(name: str, evaluations: int = 60, seed: int = 0):
    start, bounds = [0.3, 0.3], (-1.5, 1.5)
    return {
        "cma": lambda: CmaEs(start, bounds, evaluations, seed),
        "cobyla": lambda: Cobyla(start, bounds, evaluations),
        "random": lambda: Random(start, bounds, evaluations, seed),
    }[name]()


@pytest.mark.parametrize(("name", "within"), [("cma", 0.05), ("cobyla", 1e-3), ("random", 0.5)])
def test_the_optimum_is_found_within_the_budget(name: str, within: float) -> None:
    found = search(Mixture(BASE, EXPERTS).at, score, optimiser(name))
    assert found.best.point == pytest.approx([0.6, 0.4], abs=within)
    assert len(found.trials) <= 60 and found.best.score == max(trial.score for trial in found.trials)
    assert torch.equal(found.weights["w"], Mixture(BASE, EXPERTS).at(found.best.point)["w"])


@pytest.mark.parametrize("name", ["cma", "cobyla", "random"])
def test_a_budget_is_kept_and_all_of_the_box_is_respected(name: str) -> None:
    found = search(Mixture(BASE, EXPERTS).at, lambda weights: float(weights["w"].sum()), optimiser(name, 17))
    assert len(found.trials) <= 17
    assert all(-1.5 - 1e-9 <= value <= 1.5 + 1e-9 for trial in found.trials for value in trial.point)


@pytest.mark.parametrize("name", ["cma", "random"])
def test_the_seed_decides_the_points(name: str) -> None:
    runs = [search(Mixture(BASE, EXPERTS).at, score, optimiser(name, 20, seed)).trials for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0] != runs[2]


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["cma", "cobyla", "random"])
@pytest.mark.parametrize("at", [1, 7, 19])
def test_an_interrupted_search_ends_the_same_and_repeats_nothing(tmp_path: Path, name: str, at: int) -> None:
    whole = search(Mixture(BASE, EXPERTS).at, score, optimiser(name, 24))
    journal, scored = tmp_path / "trials.jsonl", []

    def dying(weights) -> float:
        if len(scored) == at:
            raise Killed
        scored.append(0)
        return score(weights)

    with pytest.raises(Killed):
        search(Mixture(BASE, EXPERTS).at, dying, optimiser(name, 24), journal=journal, fingerprint="f")
    with journal.open("a") as file:
        file.write('{"point": [0.1')  # a line cut by the crash
    scored = list(range(-1000, 0))
    found = search(Mixture(BASE, EXPERTS).at, dying, optimiser(name, 24), journal=journal, fingerprint="f")
    assert found.trials == whole.trials and torch.equal(found.weights["w"], whole.weights["w"])
    assert len(scored) - 1000 == len(whole.trials) - at
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) == 1 + len(whole.trials)
    with pytest.raises(StorageError, match="belongs to a search over other models"):
        search(Mixture(BASE, EXPERTS).at, score, optimiser(name, 24), journal=journal, fingerprint="g")


def test_equal_scores_go_to_the_preferred_and_then_the_first() -> None:
    points = Points([[0.1, 0.0], [0.2, 0.0], [0.3, 0.0]])
    found = search(
        lambda point: {"w": torch.tensor(point)}, lambda w: 1.0, points, prefer=lambda point: -abs(point[0] - 0.2)
    )
    assert found.best.point == [0.2, 0.0]
    again = search(lambda point: {"w": torch.tensor(point)}, lambda w: 1.0, Points([[0.1], [0.2]]))
    assert again.best.point == [0.1]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="at least 4 for 2 coefficients"):
        Cobyla([0.0, 0.0], (0, 1), 3)
    with pytest.raises(ConfigError, match="at least two coefficients"):
        CmaEs([0.0], (0, 1), 10, 0)
    with pytest.raises(ConfigError, match="proposed nothing"):
        search(lambda point: {}, lambda w: 0.0, Points([]))
