"""A soup of another program has the record, the table and the page of our own soups."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from soups.errors import StorageError
from soups.reporting import (
    Decision,
    Row,
    SoupReport,
    draw_all,
    page_of,
    read_page,
    remake,
    summary_sentence,
    tables,
    write_csv,
)
from soups.reporting.columns import metric_on_test
from soups.reporting.page import Curves, Scatter, Steps, Table
from soups.stores.pool import Ingredient

MORE = [f"val/metric_number_{number}_macro_average" for number in range(13)]


def report(mode: str = "min", more: tuple[str, ...] = ()) -> SoupReport:
    def row(name: str, kind: str, level: float, note: str = "", test: bool = False) -> Row:
        heldout = {"val/rmse": level, "val/loss": level**2, **dict.fromkeys(more, 1234.5678)}
        return Row(
            name=name, kind=kind, note=note,
            metrics={"heldout": heldout, **({"test": {"test/rmse": level + 0.5, "test/loss": 9.0}} if test else {})},
        )  # fmt: skip

    best, worse = (0.25, 0.75) if mode == "min" else (0.75, 0.25)
    return SoupReport(
        fingerprint="f" * 64, name="greedy", metric="val/rmse", mode=mode,  # type: ignore[arg-type]
        members=["a1" + "0" * 62], ingredients=["a1" + "0" * 62, "b2" + "0" * 62], splits={"heldout": 100, "test": 0},
        rows=[
            row("start", "start", 3.0 if mode == "min" else 0.1, test=True), row("a1000000", "ingredient", best, "kept: the best"),
            row("b2000000", "ingredient", worse), row("mean of ingredients", "mean", 0.5),
            row("best single", "best", best, "a1000000", test=True), row("uniform soup", "soup", 0.5, test=True),
            row("greedy soup", "soup", best, "1 averaged", test=True),
        ],
        steps=[
            Decision(name="a1000000", own_score=best, soup_score=best, to_reach=None, kept=True),
            Decision(name="b2000000", own_score=worse, soup_score=0.5, to_reach=best, kept=False),
        ],
        lineage={"soup": "hash"}, seconds={"search": 1.0},
    )  # fmt: skip


def shown(made: SoupReport, width: int) -> tuple[str, int]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    found = tables(made, width)
    for table in found:
        console.print(table)
    return console.export_text(), len(found)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_fifteen_metrics_are_read_at_any_width(width: int) -> None:
    text, count = shown(report(more=tuple(MORE)), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("1234.5678") == 7 * 13, "each model's value of each metric"
    assert text.count("0.2500") >= 3, "the metric that selected"
    assert count > 1 and text.count("mean of ingredients") == count, "every part names its rows"
    flat = "".join(text.split())
    for number in range(13):
        assert f"number_{number}_" in flat.replace("│", "").replace("┃", "") or f"{number}_" in text


def test_short_tables_stay_in_one() -> None:
    text, count = shown(report(), 120)
    assert count == 1 and "kept: the best" in text and "selected by val/rmse, smaller is better" in text


@pytest.mark.parametrize(("mode", "best"), [("min", "0.2500"), ("max", "0.7500")])
def test_the_better_figure_is_marked_in_either_direction(mode: str, best: str) -> None:
    console = Console(width=160, record=True, force_terminal=True, color_system="standard", file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in tables(report(mode), 160):
        console.print(table)
    green = {
        part.text
        for part in console._record_buffer
        if part.style and part.style.color and part.style.color.name == "green"
    }
    assert {text.strip() for text in green} == {best, f"{float(best) + 0.5:.4f}"}, (
        "its own column and the test metric's"
    )


def test_the_record_is_one_and_reads_what_was_written_before(tmp_path: Path) -> None:
    report().save(tmp_path)
    assert SoupReport.load(tmp_path) == report()
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"][1]["metrics"]["heldout"]["val/rmse"] == 0.25 and content["mode"] == "min"
    assert (content["kind"], content["name"], content["recipe"]) == ("soup", "greedy", "greedy")

    ours = {
        **content, "metric": "loss",
        "rows": [{"name": "best single", "kind": "best", "accuracy": {"heldout": 0.9}, "loss": {"heldout": 0.3}, "note": "", "interval": {}}],
    }  # fmt: skip
    for key in ("mode", "kind", "name", "versions", "pool", "settings"):
        del ours[key]
    ours["lineage"] = {"soup": "hash", "versions": {"torch": "1.9"}, "pool": "pools/ours"}
    (tmp_path / "report.json").write_text(json.dumps(ours))
    read = SoupReport.load(tmp_path)
    assert read.mode == "min" and read.rows[0].metrics == {"heldout": {"accuracy": 0.9, "loss": 0.3}}
    assert read.rows[0].accuracy == {"heldout": 0.9} and read.classifies
    assert (read.name, read.versions, read.pool) == ("greedy", {"torch": "1.9"}, "pools/ours")

    theirs = {
        "fingerprint": "f", "recipe": "greedy", "monitor": "val/rmse", "mode": "min", "start": "s", "soup": "w", "members": ["a"],
        "ingredients": ["a", "b"], "seconds": {"search": 1.0}, "versions": {"torch": "2"}, "pool": "pools/mine", "warnings": [],
        "rows": [
            {"name": "a", "heldout": {"val/rmse": 0.2}, "test": {}, "note": ""},
            {"name": "best single", "heldout": {"val/rmse": 0.2}, "test": {"test/rmse": 0.4}, "note": "a"},
            {"name": "greedy soup", "heldout": {"val/rmse": 0.1}, "test": {"test/rmse": 0.3}, "note": "1 averaged"},
        ],
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(theirs))
    read = SoupReport.load(tmp_path)
    assert (read.metric, read.mode, list(read.splits)) == ("val/rmse", "min", ["heldout", "test"])
    assert (read.name, read.versions, read.pool) == ("greedy", {"torch": "2"}, "pools/mine")
    assert read.row("greedy soup").value("test", "test/rmse") == 0.3 and read.row("a").kind == "ingredient"
    assert remake(tmp_path).is_file() and "val/rmse" in (tmp_path / "report.html").read_text()


def test_a_file_that_is_no_report_is_told_in_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"something": "else"}')
    with pytest.raises(StorageError) as error:
        read_page(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "faults in all" in text and "best left alone" in text and len(text) < 600


def test_the_page_and_the_sentence_say_what_the_report_says(tmp_path: Path) -> None:
    history = [{"epoch": 1, "step": 2, "val/rmse": 0.9}, {"epoch": 2, "step": 4}]
    record = Ingredient(
        fingerprint="a1" + "0" * 62, determinants={}, metrics={"heldout": {"val/rmse": 0.25}}, history=history
    )
    made = page_of(report(), [record])
    table = next(part for part in made.parts if isinstance(part, Table))
    assert table.columns == ["model", "val/rmse", "test/rmse", "val/loss", "test/loss", "note"]
    assert table.rows[6][:3] == ["greedy soup", 0.25, 0.75] and table.rows[1][2] is None and table.highlight == [6]
    scatter = next(part for part in made.parts if isinstance(part, Scatter))
    assert (scatter.x_label, scatter.y_label) == ("val/rmse", "test/rmse") and "Down and to the left" in scatter.note
    assert scatter.groups["greedy soup"][0].x == 0.25 and "in the soup" not in scatter.groups
    steps = next(part for part in made.parts if isinstance(part, Steps))
    assert steps.score_label == "val/rmse" and steps.scores == [0.25, 0.5]
    curve = next(part for part in made.parts if isinstance(part, Curves))
    assert curve.x == [1, 2] and curve.series == {"a1000000": [0.9, 0.25]}, "the last point is the final score"
    assert summary_sentence(report()) == (
        "The greedy soup averages 1 of 2 ingredients: val/rmse 0.2500 against 0.2500 of the best single one, test/rmse "
        "0.7500 against 0.7500 (smaller is better)."
    )
    assert set(draw_all(report(), tmp_path)) == {"scatter", "greedy_path"}
    write_csv(report(), tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert rows[4]["heldout:val/rmse"] == "0.25" and rows[1]["test:test/rmse"] == ""


@pytest.mark.parametrize(
    ("held_out", "test"),
    [
        ("val/acc", "test/acc"),
        ("valid_acc", "test_acc"),
        ("validation/acc", "test/acc"),
        ("acc", "acc"),
        ("val/acc", None),
    ],
)
def test_the_test_metric_is_the_one_of_the_same_name(held_out: str, test: str | None) -> None:
    rows = [
        Row(name="best single", kind="best", metrics={"heldout": {held_out: 1.0}, "test": {test or "test/f1": 0.5}})
    ]
    made = report().model_copy(update={"metric": held_out, "rows": rows})
    assert metric_on_test(made) == test
