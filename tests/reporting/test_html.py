"""The HTML page as text: whole, escaped, the same every time, and made again from records alone."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from soups.errors import StorageError
from soups.evaluation import distances
from soups.evaluation.statistics import wilson
from soups.reporting import SoupReport, page_of, read_page, remake, render, save_page, write_html
from soups.reporting.differences import differences
from soups.reporting.html import embeddable
from soups.reporting.page import Curves, Page, Scatter, Steps, Table
from soups.reporting.pairs import agreement_heatmap, compare_members, distance_heatmaps
from soups.reporting.soup_report import Difference
from soups.stores import DictStore
from soups.stores.pool import Ingredient, Pool

sys.path.insert(0, str(Path(__file__).parent))
from pages import EVIL, page
from test_reporting import report


class Reader(HTMLParser):
    """Collects elements, scripts and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in = tag if tag in ("script", "style") else self._in
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in = "" if tag in ("script", "style") else self._in

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_names_cannot_break_out() -> None:
    found = Reader(render(page()))
    assert len(found.scripts) == 2, "the data and the script, and no other"
    assert [tag for tag, _ in found.elements].count("img") == 0
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    data = json.loads(found.scripts[0])
    assert EVIL in data["figures"][0]["groups"], "and the name arrives as it is"
    assert any(EVIL in row for row in found.rows)
    assert json.loads(embeddable({"a": "<!--<script>&\u2028"})) == {"a": "<!--<script>&\u2028"}
    assert not set("<>&") & set(embeddable(EVIL))


def test_nothing_is_loaded_and_nothing_else_may_run() -> None:
    text = render(page())
    found = Reader(text)
    for tag, attributes in found.elements:
        address = attributes.get("src") or attributes.get("href") or ""
        assert address == "" or address.startswith("#") or (tag, address) == ("link", "data:,")
    outside = [place for place in re.findall(r"https?://[^\s\"'<)]+", text) if place != "http://www.w3.org/2000/svg"]
    assert outside == [] and "@import" not in text and "url(" not in text
    policy = next(a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "'sha256-" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]


def test_the_same_page_gives_the_same_bytes(tmp_path: Path) -> None:
    save_page(page(), tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert remake(tmp_path).read_bytes() == first == render(page()).encode()


def test_numbers_intervals_and_what_is_missing() -> None:
    rows = Reader(render(page())).rows
    assert rows[0][1:3] == ["test%", "secondss"]
    assert rows[1][:3] == ["beta", "97.5096.2–98.5", "3"]  # the interval with a digit less
    assert rows[4][:3] == ["delta", "–", "–"]
    values = next(row for row in rows if row[:1] == ["0.500"])
    assert values[1] == "0.300.20–0.40" or values[1].startswith("0.300"), "a figure's values are in its table"
    headings = [row for row in rows if "optimizer.lr" in row]
    assert headings and "optimizer.name" not in headings[0] and "seed" not in headings[0]


def test_settings_that_differ() -> None:
    one = {"a": {"b": 1, "c": {}}, "d": float("nan"), "flag": True}
    other = {"a": {"b": 1, "c": {"x": 2}}, "d": float("nan"), "flag": 1}
    assert differences({"1": one, "2": other}) == (["a.c", "flag", "a.c.x"], {"a.b": 1, "d": one["d"]})
    assert differences({}) == ([], {})


def test_a_soups_page_says_what_its_report_says() -> None:
    made = page_of(report())
    table = next(part for part in made.parts if isinstance(part, Table))
    assert table.columns[:3] == ["model", "held-out, %", "test, %"]
    row = next(row for row in table.rows if row[0] == "greedy soup")
    expected = wilson(90, 100)
    low, high = expected.low, expected.high
    assert row[1].value == 90.0 and (row[1].low, row[1].high) == (100 * low, 100 * high)  # type: ignore[union-attr]
    assert next(row for row in table.rows if row[0] == "mean of ingredients")[1].low is None  # type: ignore[union-attr]
    assert table.highlight == [6]
    steps = next(part for part in made.parts if isinstance(part, Steps))
    assert steps.to_reach == [None, 90.0] and steps.kept == [True, False] and steps.scores == [90.0, 85.0]
    scatter = next(part for part in made.parts if isinstance(part, Scatter))
    assert [point.name for point in scatter.groups["in the soup"]] == ["a1000000"]
    assert scatter.groups["greedy soup"][0].x == pytest.approx(80.0)
    assert page_of(report().model_copy(update={"warnings": ["few samples"]})).warnings == ["few samples"]
    render(made)
    without_ood = page_of(report(ood=False))
    assert next(part for part in without_ood.parts if isinstance(part, Scatter)).x_label == "held-out accuracy, %"


def soup_with_a_pool(tmp_path: Path) -> tuple[SoupReport, Pool]:
    pool = Pool(tmp_path / "pool")
    start = {"w": torch.zeros(3, 2), "count": torch.tensor(7)}
    pool.add_start(Ingredient(fingerprint="5" * 64, determinants={}), start)
    first = pool.starts()[0]
    for name, lr, values in (("a1", 0.1, (3.0, 0.0)), ("b2", 0.2, (0.0, 4.0))):
        weights = {"w": torch.zeros(3, 2), "count": torch.tensor(7)}
        weights["w"][0] = torch.tensor(values)
        record = Ingredient(
            fingerprint=name + "0" * 62, determinants={"optimizer": {"lr": lr}, "seed": 3}, start=first.weights,
            metrics={"heldout": {"accuracy": 0.9 if name == "a1" else 0.8}}, durations={"total": 2.0},
            history=[{"epoch": 1, "heldout/accuracy": 0.5, "train/loss": 2.0}, {"epoch": 2, "heldout/accuracy": 0.8}],
        )  # fmt: skip
        added = pool.add(record, weights)
        pool.add_predictions(added.weights, "split", torch.eye(4) if name == "a1" else torch.eye(4)[[0, 1, 3, 2]])
    return report().model_copy(update={"pool": pool.url}), pool


def test_distances_directions_and_agreement_by_hand(tmp_path: Path) -> None:
    _, pool = soup_with_a_pool(tmp_path)
    far, angle, same = compare_members(pool, pool.ingredients()[::-1], "split")
    assert far.row_labels == ["start", "a1000000", "b2000000"], "best first"
    assert torch.allclose(torch.tensor(far.values), torch.tensor([[0.0, 3, 4], [3, 0, 5], [4, 5, 0]]))
    assert angle.values == [[1.0, 0.0], [0.0, 1.0]]
    assert same.values == [[100.0, 50.0], [50.0, 100.0]]
    assert [part.title for part in compare_members(pool, pool.ingredients(), "another split")] == [
        far.title,
        angle.title,
    ]
    assert compare_members(pool, pool.ingredients()[:1], "split") == []


def test_equal_models_are_at_distance_zero() -> None:
    start, moved = torch.zeros(3), torch.full((3,), 1 / 3)
    far, angle = distance_heatmaps(["a", "b"], distances([DictStore({"w": one}) for one in (start, moved, moved)]))
    assert far.values[1][2] == 0.0 and angle.values[0][1] == pytest.approx(1.0)
    none = distance_heatmaps(["a", "b"], torch.zeros(3, 3, dtype=torch.float64))[1]
    assert none.values == [[1.0, 0.0], [0.0, 1.0]], "no direction where nothing moved"
    assert agreement_heatmap(["a"], [torch.eye(3)]).values == [[100.0]]


def test_an_older_soup_gets_its_page_from_the_pool_or_without_it(tmp_path: Path) -> None:
    made, pool = soup_with_a_pool(tmp_path)
    folder = tmp_path / "soups" / "greedy"
    folder.mkdir(parents=True)
    made.save(folder)
    found = read_page(folder)
    assert list(found.configs) == ["a1000000", "b2000000"]
    curves = next(part for part in found.parts if isinstance(part, Curves))
    assert curves.x == [1, 2] and curves.series["a1000000"] == [50.0, 80.0]
    assert remake(folder).name == "report.html" and sorted(path.name for path in folder.iterdir()) == [
        "report.html",
        "report.json",
    ]
    for name in pool.names():
        pool.remove(name)
    assert read_page(folder).configs == {}
    (folder / "page.json").write_text("{")
    with pytest.raises(StorageError, match=r"page\.json cannot be read"):
        remake(folder)
    with pytest.raises(StorageError, match=r"holds neither page\.json nor report\.json"):
        remake(tmp_path)


def test_old_records_load_and_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ingredient.model_validate({"fingerprint": "a", "determinants": {}}).history == []
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StorageError, match="disk is full"):
        write_html(page(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_almost_nothing() -> None:
    text = render(Page(title="Empty", subject="merge", summary="Nothing."))
    assert "<h1>Empty</h1>" in text and 'id="settings"' not in text and "<nav" not in text


def test_one_members_settings_are_not_compared() -> None:
    text = render(Page(title="One", subject="protocol", summary="One.", configs={"study": {"seed": 1, "lr": 0.1}}))
    assert "2 settings</summary>" in text and "same settings" not in text and "that all share" not in text


def test_a_soup_that_is_the_best_single_model_is_called_identical() -> None:
    def change(name: str, p_value: float) -> Difference:
        return Difference(
            name=name,
            against="best single",
            split="test",
            value=0.0,
            low=-0.01,
            high=0.01,
            p_value=p_value,
            test="exact McNemar",
        )

    made = report().model_copy(update={"differences": [change("greedy soup", 1.0), change("uniform soup", 2e-7)]})
    table = next(
        part for part in page_of(made).parts if isinstance(part, Table) and part.title.startswith("Soups against")
    )
    assert [row[2:] for row in table.rows if str(row[0]).startswith("greedy")] == [[None, None, "identical"]]
    assert [row[3:] for row in table.rows if str(row[0]).startswith("uniform")] == [[2e-7, "exact McNemar"]]
    rows = Reader(render(page_of(made))).rows
    assert any("< 0.001" in row for row in rows), "p-values have one form"


def test_a_fit_of_one_epoch_has_a_beginning_and_an_end() -> None:
    def record(name: str, history: list[dict[str, float]]) -> Ingredient:
        return Ingredient(
            fingerprint=name + "0" * 62, determinants={}, metrics={"heldout": {"accuracy": 0.9}}, history=history
        )

    members = [
        record("a1", [{"epoch": 1, "step": 3}]),
        record("b2", [{"epoch": 1, "step": 3, "heldout/accuracy": 0.7}, {"epoch": 2, "step": 6}]),
    ]
    curves = next(part for part in page_of(report(), members).parts if isinstance(part, Curves))
    assert curves.x == [0, 1, 2]
    assert curves.series == {"a1000000": [60.0, 90.0, None], "b2000000": [None, 70.0, 90.0]}, "from the start's 60 %"
