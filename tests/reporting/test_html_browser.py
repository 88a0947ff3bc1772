"""The page in a real browser: no errors, no requests; sorting, hovering, keys, themes, narrow screens and print."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soups.reporting import page_of, write_html
from soups.reporting.page import Curves, Matrix, Page, Steps, Table

sys.path.insert(0, str(Path(__file__).parent))
from pages import EVIL, page
from test_reporting import report

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'soups[browser]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROME") or next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed (apt-get install chromium), nor named by CHROME"),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with api.sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's own sandbox does not start.
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(page(), path)
    return path.as_uri()


@pytest.fixture
def opened(browser, address: str) -> Iterator:
    """The page, loaded; at the end nothing may have gone wrong and nothing may have been asked of a network."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    view = context.new_page()
    problems: list[str] = []
    view.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.on("request", lambda request: None if request.url == address else problems.append(f"request {request.url}"))
    view.goto(address)
    yield view
    assert view.evaluate("window.broken") is None, "a name was run"
    assert problems == []
    context.close()


def column(view, number: int) -> list[str]:
    script = "([n]) => [...document.querySelectorAll('#part-0 tbody tr')].map(row => row.cells[n].firstChild?.textContent.trim() ?? '')"
    return view.evaluate(script, [number])


def test_every_figure_is_drawn_and_a_name_stays_a_name(opened) -> None:
    assert opened.locator(".plot > svg").count() == 6
    assert opened.locator("#part-1 .plot svg > path").count() == 7, "the far point is named below the frame"
    assert "probe (60.00 %, 42.00 %)" in opened.locator("#part-1 .outside").inner_text()
    opened.get_by_role("button", name="Show all points").click()
    assert opened.locator("#part-1 .plot svg > path").count() == 8
    assert (
        opened.locator("#part-5 .plot rect").count() == 36 + 40
        and opened.locator("#part-6 .plot rect").count() == 21 * 21 + 40
    )
    assert opened.get_by_role("button", name=EVIL, exact=False).count() == 3, "in two legends and a heading"


def test_sorting_by_click_and_by_key(opened) -> None:
    head = opened.locator("#part-0 th", has_text="test")
    button = head.get_by_role("button")
    button.click()
    assert column(opened, 0) == ["alpha", "beta", "gamma", "delta"] and head.get_attribute("aria-sort") == "descending"
    button.focus()
    opened.keyboard.press("Enter")
    assert column(opened, 0) == ["gamma", "beta", "alpha", "delta"], "by value, not by text; the empty cell stays last"
    opened.keyboard.press("Space")
    assert column(opened, 0) == ["beta", "alpha", "gamma", "delta"] and head.get_attribute("aria-sort") == "none"
    opened.locator("#part-0 th", has_text="seconds").get_by_role("button").click()
    assert column(opened, 2) == ["100", "20", "3", "–"]
    assert "descending" in opened.locator("#live").inner_text()


def test_hovering_and_arrow_keys_show_values(opened) -> None:
    plot, tip = opened.locator("#part-1 .plot"), opened.locator("#tip")
    assert tip.is_hidden()
    plot.scroll_into_view_if_needed()
    box = plot.locator("svg > path").nth(6).bounding_box()  # the soup: drawn last
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "97.90 %" in tip.inner_text() and "98.00 %" in tip.inner_text() and EVIL[:20] in tip.inner_text()
    opened.mouse.move(5, 5)
    assert tip.is_hidden()
    opened.locator("#part-1 .legend button").last.focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.classList.contains('plot')")
    first = tip.inner_text()
    opened.keyboard.press("ArrowRight")
    assert tip.inner_text() != first and opened.locator("#live").inner_text().startswith("1a3f9c01")
    opened.keyboard.press("Escape")
    assert tip.is_hidden()
    for part, expected in (("part-2", "decision"), ("part-3", "0.3 (0.2 to 0.4)"), ("part-5", "0a3f9c01 and 2a3f9c01")):
        opened.locator(f"#{part} .plot").focus()
        for key in ("Home", "ArrowRight", "ArrowRight"):
            opened.keyboard.press(key)
        assert expected in tip.inner_text()


def test_the_legend_hides_a_group(opened) -> None:
    button = opened.locator("#part-3 .legend button").first
    assert opened.locator("#part-3 .plot path").count() == 3  # band, two lines
    button.click()
    assert opened.locator("#part-3 .plot path").count() == 1 and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert opened.locator("#part-3 .plot path").count() == 3


def test_themes(browser, address: str) -> None:
    context = browser.new_context(color_scheme="dark")
    view = context.new_page()
    view.goto(address)
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = view.evaluate(paper)
    view.get_by_role("button", name="Dark theme").click()
    light = view.evaluate(paper)
    assert dark == "rgb(20, 23, 27)" and light == "rgb(255, 255, 255)"
    view.reload()
    assert view.evaluate(paper) == light, "the choice is kept"
    view.get_by_role("button", name="Dark theme").click()
    view.emulate_media(media="print")
    assert view.evaluate(paper) == light, "paper is white"
    context.close()


def test_print_and_a_narrow_screen(opened) -> None:
    assert opened.pdf(format="A4").startswith(b"%PDF")
    opened.emulate_media(media="print")
    assert opened.locator("#theme").is_hidden() and opened.locator("#part-1 .plot svg").is_visible()
    opened.emulate_media(media="screen")
    opened.set_viewport_size({"width": 360, "height": 700})
    opened.wait_for_function("document.querySelector('#part-1 .plot svg').viewBox.baseVal.width < 360")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360, "only tables scroll sideways"


def test_without_the_script_the_values_are_there(browser, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto(address)
    assert view.locator(".plot").first.is_hidden()
    view.locator("#part-3 summary").click()
    assert view.locator("#part-3 table").is_visible()
    context.close()


def test_a_soups_page_opens(browser, tmp_path: Path) -> None:
    write_html(page_of(report()), tmp_path / "report.html")
    view = browser.new_page()
    problems: list[str] = []
    view.on("console", lambda message: problems.append(message.text))
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.goto((tmp_path / "report.html").as_uri())
    assert view.locator(".plot > svg").count() == 2 and problems == []
    view.close()


LONG = "model.encoder.layers.{}.self_attention.query_key_value_projection.lora_A.default.weight"


def test_long_names_fit_a_telephone_and_are_told_apart(browser, tmp_path: Path) -> None:
    tensors = [LONG.format(number) for number in range(9)]
    whole = Page(
        title=f"Soup of {tensors[0]}", subject="soup", summary=tensors[0], warnings=[tensors[0]],
        parts=[
            Table(title=tensors[0], columns=["tensor", tensors[1]], rows=[[name, name] for name in tensors]),
            Matrix(title="Cosines", row_labels=tensors, column_labels=tensors, values=[[1.0 * i * j for j in range(9)] for i in range(9)]),
            Curves(title="Curves", x_label="epochs", y_label=tensors[0], x=[0, 1], series={name: [1.0, 2.0] for name in tensors[:3]}),
            Steps(title="Search", score_label="s", names=tensors, scores=[1.0] * 9, to_reach=[None, *[1.0] * 8], kept=[True] * 9),
        ],
        configs={tensors[0]: {"a": tensors[0]}, tensors[1]: {"a": "b"}}, lineage={tensors[0]: tensors[1]}, environment={tensors[0]: "1"},
    )  # fmt: skip
    write_html(whole, tmp_path / "report.html")
    view = browser.new_page(viewport={"width": 390, "height": 800})
    view.goto((tmp_path / "report.html").as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("part-1", "part-3"):
        names = view.locator(f"#{part} .plot svg text").all_text_contents()
        for number in range(9):
            assert any(f"{number}" in name and len(name) <= 16 for name in names), "cut, and still told apart"


@pytest.mark.parametrize("columns", [3, 8, 9, 10, 14, 40])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_heat_map_has_the_heading_of_its_last_column(browser, tmp_path: Path, columns: int, width: int) -> None:
    names = [f"{number:02d}ab34cd" for number in range(columns)]
    part = Matrix(title="Agreement", row_labels=names, column_labels=names, values=[[1.0] * columns] * columns)
    write_html(Page(title="T", subject="soup", summary="", parts=[part]), tmp_path / "report.html")
    view = browser.new_page(viewport={"width": width, "height": 800})
    view.goto((tmp_path / "report.html").as_uri())
    boxes = """() => { const svg = document.querySelector('.plot svg').getBoundingClientRect();
        return [...document.querySelectorAll('.plot svg text')].map(t => { const b = t.getBoundingClientRect();
            return [t.textContent, b.left >= svg.left - 1 && b.right <= svg.right + 1 && b.top >= svg.top - 1]; }); }"""
    found = view.evaluate(boxes)
    assert all(inside for _, inside in found), "no heading is cut"
    assert sum(text == names[-1] for text, _ in found) == 2, "the last row's and the last column's"
