"""A protocol's page as terminal tables, figures and a tracked run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from soups.reporting import draw_page, page_tables
from soups.reporting.page import Cell, ChartPoint, Curves, Page, Scatter, Table
from soups.tracking import log_page

PAGE = Page(
    title="A protocol",
    subject="protocol",
    summary="It went up.",
    parts=[
        Table(title="Models", columns=["model", "test, %"], rows=[["a", 81.256], ["b", Cell(value=82, low=81, high=83)]]),
        Curves(title="By round", x_label="round", y_label="accuracy, %", x=[0, 1, 2],
               series={"seen": [70.0, 75.0, 80.0], "some": [60.0, None, 65.0]},
               low={"seen": [69.0, 74.0, 79.0]}, high={"seen": [71.0, 76.0, 81.0]}),
        Scatter(title="Front", x_label="x", y_label="y", groups={"a": [ChartPoint(name="a", x=1, y=2)]}, connect=["a"]),
    ],
)  # fmt: skip


def test_tables_and_figures(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        for table in page_tables(PAGE):
            console.print(table)
    text = capture.get()
    assert "81.26" in text and "82.00 [81.00, 83.00]" in text
    drawn = draw_page(PAGE, tmp_path)
    assert set(drawn) == {"by_round", "front"}
    for path in drawn.values():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.slow
def test_rounds_are_the_axis_of_the_tracked_curves(tmp_path: Path) -> None:
    figures = draw_page(PAGE, tmp_path)
    tracking = {"mode": "offline", "project": "soups", "entity": None, "group": None}
    log_page(tracking, tmp_path, "a-protocol-1234", "a-pool", PAGE.model_dump(mode="json"), figures)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    found = json.dumps(records)
    assert "a-pool" in found
    axes = {
        record["metric"].get("glob_name"): record["metric"].get("step_metric")
        for record in records
        if record["type"] == "metric"
    }
    assert axes["By round/*"] == "round"
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    seen = [(row["round"], row["By round/seen"]) for row in rows if "round" in row]
    assert seen == [(0, 70), (1, 75), (2, 80)]
    assert list((tmp_path / "wandb").rglob("media/images/**/*.png")) and list(
        (tmp_path / "wandb").rglob("media/table/**/*.json")
    )
