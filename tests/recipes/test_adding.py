"""A recipe is one module, a line in `RECIPES`, a configuration and a row in the README: these four agree."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from soups.merging import METHODS, make_method
from soups.recipes import RECIPES, needs_of, options_of
from soups.soup_making.options import common_options

ROOT = Path(__file__).parents[2]
# What recipes share, and is none.
MERGES = {
    path.stem: OmegaConf.to_container(OmegaConf.load(path))["soup"]  # type: ignore[index]
    for path in (ROOT / "conf" / "soup").glob("*.yaml")
    if "- merge\n" in path.read_text()
}
HELPERS = {"__init__", "checkpoints", "racing", "recipe", "replay"}


def test_the_four_places_agree() -> None:
    configured = {path.stem for path in (ROOT / "conf" / "soup").glob("*.yaml")} - {"base"} - set(MERGES)
    modules = {path.stem for path in (ROOT / "soups" / "recipes").glob("*.py")} - HELPERS
    assert configured == modules == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_configuration_and_its_row(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe is getattr(import_module(f"soups.recipes.{name}"), name), "the function has the module's name"
    section = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "soup" / f"{name}.yaml"))["soup"]  # type: ignore[index]
    assert section.pop("recipe") == name
    assert {key: value for key, value in section.items() if key not in common_options(name)} == options_of(recipe), (
        "same defaults"
    )
    assert ("start" in section) == ("start" in needs_of(recipe))
    assert f"| `soups.recipes.{name}` | `+soup={name}` |" in (ROOT / "README.md").read_text()
    assert f"| `{name}` |" in (ROOT / "soups" / "recipes" / "README.md").read_text(), "a card"


def test_what_the_readme_names_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in [line for line in readme.splitlines() if line.startswith("python train.py")]:
        for word in command.split("#")[0].split()[2:]:
            key, _, value = word.lstrip("+").partition("=")
            if (ROOT / "conf" / key).is_dir() and not key.startswith("hydra/"):  # those have plugins of their own too
                for choice in value.strip("[]").split(","):
                    ours = (ROOT / "conf" / key / f"{choice}.yaml").is_file()
                    assert ours or word in ("hydra/launcher=joblib",), word
    for dotted in set(re.findall(r"`(soups\.[a-z_.]+)`", readme)):
        module, _, name = dotted.rpartition(".")
        parent = import_module(module)
        is_module = hasattr(parent, "__path__") and find_spec(dotted) is not None
        assert is_module or hasattr(parent, name), dotted


@pytest.mark.parametrize("name", MERGES)
def test_merges_with_candidates_name_a_method_and_its_parameters(name: str) -> None:
    section = MERGES[name]
    assert section["method"] == name and set(section) <= {"method", "parameters"}
    known = METHODS[name].parameters
    for parameter, candidates in section.get("parameters", {}).items():
        assert parameter in known and isinstance(candidates, list) and len(candidates) > 1
        for candidate in candidates:
            make_method(name, **{parameter: candidate})
