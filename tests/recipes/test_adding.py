"""A recipe is one module, a line in `__init__`, a configuration and a row in the README: these four agree."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import soups.recipes
from soups.launch.cook import RECIPES

ROOT = Path(__file__).parents[2]


def test_the_four_places_agree() -> None:
    configured = {path.stem for path in (ROOT / "conf" / "soup").glob("*.yaml")}
    modules = {path.stem for path in (ROOT / "soups" / "recipes").glob("*.py")} - {"__init__", "racing", "replay"}
    readme = (ROOT / "README.md").read_text()
    assert configured == modules == set(RECIPES)
    for name in configured:
        assert callable(getattr(soups.recipes, name))
        assert f"recipe: {name}\n" in (ROOT / "conf" / "soup" / f"{name}.yaml").read_text().replace(" #", "\n#")
        assert f"| `soups.recipes.{name}` | `+soup={name}` |" in readme


def test_what_the_readme_names_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in [line for line in readme.splitlines() if line.startswith("python train.py")]:
        for word in command.split("#")[0].split()[2:]:
            key, _, value = word.lstrip("+").partition("=")
            if (ROOT / "conf" / key).is_dir():
                for choice in value.strip("[]").split(","):
                    assert (ROOT / "conf" / key / f"{choice}.yaml").is_file(), word
    for dotted in set(re.findall(r"`(soups\.[a-z_.]+)`", readme)):
        module, _, name = dotted.rpartition(".")
        parent = import_module(module)
        is_module = hasattr(parent, "__path__") and find_spec(dotted) is not None
        assert is_module or hasattr(parent, name), dotted
