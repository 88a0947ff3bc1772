"""The catalogue of `make docs` lists what there is, and the community files agree with the package."""

import importlib.util
import re
from pathlib import Path

import pytest

import soups
from soups.merging import METHODS
from soups.recipes import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs/build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_catalogue_lists_everything_with_its_parameters(build) -> None:
    sections = build.catalogue()
    names = {title: [row[0] for row in rows] for title, rows in sections.items()}
    assert names["Merge methods"] == list(METHODS) and names["Recipes"] == list(RECIPES)
    assert {"EMA", "SWA", "LAWA", "PostHocEMA", "Mixout"} <= set(names["Callbacks"])
    assert set(names["Protocols"]) == {path.stem for path in (ROOT / "conf/protocol").glob("*.yaml")}
    rows = {row[0]: row for rows in sections.values() for row in rows}
    assert "density" in rows["ties"][2] and "half_life" in rows["EMA"][2]
    assert all(row[1] for row in rows.values()), "each has a sentence"
    page = build.page(sections)
    assert all(f"<code>{name}</code>" in page for name in rows) and "<script" not in page


def test_one_version_number() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text and 'version = { attr = "soups.__version__" }' in text
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", soups.__version__)
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), ROOT / "conf/README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
