"""What the studies' scripts say of their results: each aim is called reached or missed by the numbers, in both directions."""

from types import SimpleNamespace
from typing import Any

import pytest

from experiments.model_soups.run import develop, verdict
from experiments.multi_task_merging.table import rows

SCORES = {"mean of ingredients": 0.80, "best single": 0.81, "uniform soup": 0.82, "greedy soup": 0.83}


def report(kept: int = 3, **test: float) -> Any:
    """Return a report whose held-out scores are a tenth of the test scores."""
    scores = {**SCORES, **{name.replace("_", " "): value for name, value in test.items()}}
    found = {
        name: SimpleNamespace(name=name, accuracy={"test": v, "heldout": v / 10}, ood=v) for name, v in scores.items()
    }
    return SimpleNamespace(
        row=found.__getitem__, rows=list(found.values()), members=["a"] * kept, ingredients=["a"] * 8
    )


@pytest.mark.parametrize(
    ("others", "seconds", "missed"),
    [
        ([report(greedy_soup=0.84)] * 3, 100.0, ""),
        ([report(greedy_soup=0.809), report(greedy_soup=0.84), report(greedy_soup=0.84)], 100.0, "greedy is at least"),
        ([report(greedy_soup=0.81), report(greedy_soup=0.90), report(greedy_soup=0.81)], 100.0, "greedy less best"),
        ([report(uniform_soup=0.80)] * 3, 100.0, "uniform is above"),
        ([report(kept=2)] * 3, 100.0, "greedy keeps"),
        ([report()] * 3, 361.0, "seconds"),
    ],
)
def test_a_verdict_misses_the_aim_that_was_not_reached(others: list[Any], seconds: float, missed: str) -> None:
    lines = verdict([report(), *others], [90.0, seconds]).splitlines()
    assert len(lines) == 5
    assert [line for line in lines if line.startswith("- MISSED")] == [
        line for line in lines if missed and missed in line
    ]


def test_development_sees_held_out_numbers_alone() -> None:
    shown = develop([report()])
    assert "greedy soup 8.30" in shown and "83" not in shown.replace("8.30", "")


def test_a_table_of_merges_subtracts_from_the_experts(tmp_path: Any) -> None:
    path = tmp_path / "results.csv"
    path.write_text(
        "seed,model,lambda,a,b\n0,linear probe,,0.5,0.5\n0,expert: a,,0.9,0.2\n0,expert: b,,0.4,0.7\n0,average,1.0,0.6,0.6\n"
    )
    tasks, table = rows(path)
    found = {row[0]: row[1:] for row in table}
    assert tasks == ["a", "b"] and found["individual experts"] == ["", "90.0", "70.0", "80.0", "0.0"]
    assert found["average"] == ["1.0", "60.0", "60.0", "60.0", "20.0"]
    assert found["expert: a"] == ["", "90.0", "20.0", "55.0", "25.0"]
