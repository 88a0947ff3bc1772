"""The soup of somebody's program: in either direction of its metric, of the right ingredients, with a report like ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

from soups.errors import ConfigError, WeightsError
from soups.launch.own_program.configuration import Program, ProgramSpec
from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.ingredient import AFTERWARDS
from soups.launch.own_program.options import SCORED
from soups.launch.own_program.soup import make_soup
from soups.reporting import SoupReport, read_page
from soups.stores import read_safetensors
from soups.stores.pool import Ingredient, Pool
from soups.weights import hash_weights
from tests.launch.own_program.conftest import fit_of

VALUES = {"a": 0.1, "b": 0.4, "c": 0.9}
START = {"weight": torch.tensor([0.25])}


def program_with_ingredients(
    tmp_path: Path, mode: str, samples: int = 12, log: Any = None
) -> tuple[Program, Evaluation]:
    """Return a program whose metric is its one weight, and three ingredients in its pool."""
    evaluation = Evaluation(fit_of(samples=samples, **({"log": log} if log else {})))
    evaluation.validate()
    assert evaluation.data is not None
    pool = Pool(tmp_path / "pool")
    start = hash_weights(START)
    pool.add_start(Ingredient(fingerprint=start, determinants={}), START)
    for name, value in VALUES.items():
        weights = {"weight": torch.tensor([value])}
        metrics = evaluation.validate(weights)
        record = Ingredient(
            fingerprint=name * 64, determinants={"config": {"lr": value}}, start=start, metrics={"heldout": metrics},
            notes={"validation": evaluation.data.model_dump(mode="json")}, split=evaluation.data.digest,
        )  # fmt: skip
        pool.add(record, weights)
    spec = ProgramSpec({}, "raw", "last", start, evaluation.data.digest)
    return Program("val/acc", mode, spec, str(tmp_path / "pool")), evaluation  # type: ignore[arg-type]


def soup(tmp_path: Path, mode: str, recipe: str = "greedy", asked: str = "abc", **options: Any) -> SoupReport:
    program, evaluation = program_with_ingredients(tmp_path, mode, options.pop("samples", 12), options.pop("log", None))
    return make_soup(program, {"recipe": recipe, **options}, evaluation, [name * 64 for name in asked], tmp_path)[0]


@pytest.mark.parametrize(("mode", "best"), [("min", 0.1), ("max", 0.9)])
@pytest.mark.parametrize("recipe", SCORED)
def test_the_best_is_the_best_in_either_direction(tmp_path: Path, mode: str, best: float, recipe: str) -> None:
    made = soup(tmp_path, mode, recipe)
    value = {row.name: row.value("heldout", "val/acc") for row in made.rows}
    assert value["best single"] == pytest.approx(best) and made.mode == mode
    assert [row.name for row in made.rows if row.kind == "ingredient"] == [
        name * 8 for name in sorted(VALUES, key=lambda one: VALUES[one], reverse=mode == "max")
    ], "best first"
    assert value["greedy soup"] == pytest.approx(best), "an average with a worse one is worse"
    if recipe not in ("uniform", "interpolation", "merge"):
        assert value[made.soup] == pytest.approx(best), "a search never ends below what it began with"
    assert value["uniform soup"] == pytest.approx(sum(VALUES.values()) / 3)


@pytest.mark.parametrize(("mode", "kept"), [("min", "a"), ("max", "c")])
def test_the_report_is_written_like_ours(tmp_path: Path, mode: str, kept: str) -> None:
    made = soup(tmp_path, mode)
    (folder,) = (tmp_path / "soups").iterdir()
    assert read_safetensors(folder / "soup.safetensors")["weight"].tolist() == pytest.approx([VALUES[kept]])
    assert SoupReport.load(folder) == made and made.members == [kept * 64]
    assert {"report.json", "page.json", "report.html", "results.csv"} <= {path.name for path in folder.iterdir()}
    assert read_page(folder).title == "Greedy soup of 3 ingredients"
    notes = {row.name: row.note for row in made.rows}
    assert notes[kept * 8] == f"kept: the best; lr={VALUES[kept]}"
    assert notes["b" * 8].startswith("left out: soup 0."), notes
    assert (" > " in notes["b" * 8]) == (mode == "min")
    assert made.splits == {"heldout": 12} and made.steps[0].kept


def test_a_command_gets_what_it_asked_for(tmp_path: Path) -> None:
    made = soup(tmp_path, "max", "uniform", asked="ab")
    assert sorted(made.ingredients) == ["a" * 64, "b" * 64]
    assert any(
        "1 ingredient of earlier commands" in warning and "++soup.older=true" in warning for warning in made.warnings
    )
    older = soup(tmp_path, "max", "uniform", asked="ab", older=True)
    assert sorted(older.ingredients) == [name * 64 for name in "abc"] and older.warnings == []
    assert sorted(soup(tmp_path, "max", "uniform", asked="").ingredients) == [name * 64 for name in "abc"], (
        "sweep.size=0"
    )
    assert soup(tmp_path, "max", "uniform", exclude=["a"]).ingredients == ["c" * 64, "b" * 64]


def test_ingredients_of_other_data_are_refused_by_name(tmp_path: Path) -> None:
    program_with_ingredients(tmp_path, "max")
    program, other = program_with_ingredients(tmp_path / "other", "max", samples=16)
    here = Program("val/acc", "max", program.spec, str(tmp_path / "pool"))
    with pytest.raises(
        WeightsError, match=r"aaaaaaaa, bbbbbbbb, cccccccc: validated on other data \(12 samples there, 16 here\)"
    ):
        make_soup(here, {"recipe": "uniform"}, other, [name * 64 for name in "abc"], tmp_path)
    with pytest.raises(ConfigError, match="no ingredients of this start and data"):
        make_soup(here, {"recipe": "uniform", "foreign": "skip"}, other, [name * 64 for name in "abc"], tmp_path)
    # The data are part of the soup's name: the same ingredients on other data are another soup.
    again, _ = program_with_ingredients(tmp_path, "max")
    assert again.spec.data != here.spec.data


@pytest.mark.parametrize(
    ("change", "why"),
    [({"start": "another"}, "another start"), ({"notes": {}}, "before this program recorded the validation data")],
)
def test_ingredients_that_do_not_belong_are_refused_by_name(tmp_path: Path, change: dict, why: str) -> None:
    program, evaluation = program_with_ingredients(tmp_path, "max")
    pool = Pool(program.pool)
    record = pool.ingredient("a" * 64).model_copy(update={"fingerprint": "d" * 64, **change})
    pool.add(record, {"weight": torch.tensor([0.3])})
    with pytest.raises(WeightsError, match=f"dddddddd: .*{why}"):
        make_soup(program, {"recipe": "uniform"}, evaluation, ["a" * 64, "d" * 64], tmp_path)
    made, _ = make_soup(program, {"recipe": "uniform", "foreign": "skip"}, evaluation, ["a" * 64, "d" * 64], tmp_path)
    assert made.ingredients == ["a" * 64] and "1 ingredient of another start" in made.warnings[0]


@pytest.mark.parametrize(("mode", "remembers"), [("max", max), ("min", min)])
def test_metrics_that_remember_are_named_and_not_shown(tmp_path: Path, mode: str, remembers: Any) -> None:
    best: list[float] = []

    def log(module: Any, value: float) -> None:
        best.append(remembers([value, *best]))
        module.log("val/acc", value)
        module.log("val/acc_best", best[-1])
        module.log("val/double", 2 * value)

    program, evaluation = program_with_ingredients(tmp_path, mode, log=log)
    best.clear()
    made, _ = make_soup(program, {"recipe": "greedy"}, evaluation, [], tmp_path)
    assert all(set(row.metrics["heldout"]) == {"val/acc", "val/double"} for row in made.rows)
    assert any("val/acc_best" in warning and "remember" in warning for warning in made.warnings)


def test_one_that_selects_is_refused(tmp_path: Path) -> None:
    best: list[float] = []

    def log(module: Any, value: float) -> None:
        best.append(max([value, *best]))
        module.log("val/acc", best[-1])

    with pytest.raises(ConfigError, match=r"best-so-far|remembers"):
        soup(tmp_path, "max", log=log)


def test_programs_that_failed_after_the_fit_are_told(tmp_path: Path) -> None:
    program, evaluation = program_with_ingredients(tmp_path, "max")
    pool = Pool(program.pool)
    record = pool.ingredient("a" * 64)
    notes = {**record.notes, AFTERWARDS: "ValueError: [/data/plots]", "fits": 2}
    pool.add(record.model_copy(update={"fingerprint": "d" * 64, "notes": notes}), {"weight": torch.tensor([0.1])})
    made, _ = make_soup(program, {"recipe": "uniform"}, evaluation, ["d" * 64], tmp_path)
    assert any("dddddddd" in warning and "[/data/plots]" in warning for warning in made.warnings)
    assert any("calls trainer.fit 2 times on one module" in warning for warning in made.warnings)
