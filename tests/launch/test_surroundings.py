"""`soup.barrier` and `soup.landscape`: what they show is what was measured, and the soup is the one without them."""

from pathlib import Path

import pytest

from soups.errors import ConfigError
from soups.reporting import Page
from soups.reporting.page import Curves, Matrix, Scatter
from soups.soup_making.options import SoupOptions
from tests.launch.conftest import compose_settings, fine_tune, soup_of

pytestmark = pytest.mark.slow


def test_barriers_and_landscape_of_a_small_pool(overrides: list[str], tmp_path: Path) -> None:
    for seed in range(2):
        fine_tune(compose_settings([*overrides, f"seed={seed}", "optimizer.lr=2e-3"]))
    plain, _ = soup_of(compose_settings([*overrides, "+soup=greedy"]))
    asked = ["soup.barrier=true", "soup.landscape=true", "soup.grid=3", "soup.racing=0"]
    report, folder = soup_of(compose_settings([*overrides, "+soup=greedy", *asked]))
    assert report.lineage["soup"] == plain.lineage["soup"] and report.members == plain.members
    assert report.seconds["barriers and landscape"] > 0 and "barriers and landscape" not in plain.seconds

    parts = {part.title: part for part in Page.load(folder).parts}
    for number, title in (("error", "From the start to the soup: error"), ("loss", "From the start to the soup: loss")):
        path = parts[title]
        assert isinstance(path, Curves) and path.x[0] == 0 and path.x[-1] == 2 and len(path.x) == 21
        values = dict(zip(path.x, path.series[number], strict=True))
        for place, name in ((0, "shared start"), (1, "best single"), (2, "greedy soup")):
            row = report.row(name)
            expected = row.loss["heldout"] if number == "loss" else 100 * (1 - row.accuracy["heldout"])
            assert values[place] == pytest.approx(expected, rel=1e-6), "the ends are the table's"
    barriers = parts["Barriers between ingredients"]
    assert isinstance(barriers, Matrix)
    assert barriers.values[0][0] == barriers.values[1][1] == 0 and barriers.values[0][1] == barriers.values[1][0]
    surface, places = parts["Landscape"], parts["Where the models lie in the plane"]
    assert isinstance(surface, Matrix) and isinstance(places, Scatter)
    assert len(surface.values) == len(surface.values[0]) == 3
    assert places.groups["the plane goes through"][0].name == "the start"
    assert places.groups["others, seen from above"][0].name == "the soup"


def test_a_pool_too_small_for_a_plane_is_told_of(overrides: list[str]) -> None:
    fine_tune(compose_settings(overrides))
    report, folder = soup_of(compose_settings([*overrides, "+soup=greedy", "soup.landscape=true", "soup.barrier=true"]))
    assert any("landscape was left out. It needs the start and two ingredients" in text for text in report.warnings)
    titles = [part.title for part in Page.load(folder).parts]
    assert "Landscape" not in titles and "From the start to the soup: error" in titles


@pytest.mark.parametrize("option", ["soup.racing=1", "soup.racing=yes please", "soup.grid=1"])
def test_options_that_make_no_sense(overrides: list[str], option: str) -> None:
    with pytest.raises(ConfigError, match=option.split("=")[0].replace(".", r"\.")):
        SoupOptions.read(compose_settings([*overrides, "+soup=greedy", option])["soup"])
