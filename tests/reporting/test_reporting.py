"""The closing table and the figures are made from the record alone."""

import csv
from pathlib import Path

import pytest
from rich.console import Console

from soups.errors import StorageError
from soups.reporting import Decision, Row, SoupReport, draw_all, summary_sentence, tables, write_csv


def report(ood: bool = True) -> SoupReport:
    splits = {"heldout": 100, "test": 200} | ({"noise": 200, "blur": 200} if ood else {})

    def row(name: str, kind: str, level: float, note: str = "") -> Row:
        accuracy = {split: level - 0.1 * number for number, split in enumerate(splits)}
        return Row(name=name, kind=kind, accuracy=accuracy, loss=dict.fromkeys(splits, 1.0), note=note)

    return SoupReport(
        fingerprint="f" * 64, name="greedy", metric="accuracy", members=["a1" + "0" * 62], ingredients=["a1" + "0" * 62, "b2" + "0" * 62],
        splits=splits,
        rows=[
            row("linear probe", "start", 0.6), row("a1000000", "ingredient", 0.9, "kept: the best"),
            row("b2000000", "ingredient", 0.8, "left out: soup 85.00 < 90.00"), row("mean of ingredients", "mean", 0.85),
            row("best single", "best", 0.9, "a1000000"), row("uniform soup", "soup", 0.85), row("greedy soup", "soup", 0.9),
            row("logit ensemble", "ensemble", 0.95),
        ],
        steps=[
            Decision(name="a1000000", own_score=0.9, soup_score=0.9, to_reach=None, kept=True),
            Decision(name="b2000000", own_score=0.8, soup_score=0.85, to_reach=0.9, kept=False),
        ],
        lineage={"soup": "hash"}, seconds={"search": 1.0},
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_every_number_and_reason_is_shown_whole(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    made = tables(report(), console.width)
    assert len(made) == (1 if width == 160 else 2)
    for table in made:
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    for expected in ("held-out", "noise", "blur", "OOD", "90.00", "kept: the best", "logit ensemble", "n=200"):
        assert expected in text
    assert "85.00 < 90.00" in " ".join(text.split()) or width == 80


def test_the_record_survives_the_disk_and_its_numbers_the_csv(tmp_path: Path) -> None:
    report().save(tmp_path)
    assert SoupReport.load(tmp_path) == report()
    assert list(SoupReport.load(tmp_path).splits) == ["heldout", "test", "noise", "blur"], "columns keep their order"
    write_csv(report(), tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert float(rows[1]["noise_accuracy"]) == pytest.approx(0.7)
    assert float(rows[1]["ood_accuracy"]) == pytest.approx(0.65)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(StorageError, match=r"report\.json cannot be read"):
        SoupReport.load(tmp_path)


def test_the_sentence_and_the_figures(tmp_path: Path) -> None:
    assert summary_sentence(report()) == (
        "The greedy soup averages 1 of 2 ingredients: held-out 90.00% against 90.00% of the best single one, test 80.00% "
        "against 80.00%, mean over the OOD splits 65.00% against 65.00%."
    )
    for ood in (True, False):
        drawn = draw_all(report(ood), tmp_path)
        assert set(drawn) == {"scatter", "greedy_path"}
        assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn.values())
