"""The `soup` section for programs that are not ours: the recipes and options that a validation loop is enough for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

import yaml

from soups.errors import ConfigError, did_you_mean
from soups.recipes import RECIPES, needs_of, options_of

# Recipes that need a score alone, and the start; the validation loop of a program gives no logits or gradients.
SCORED = tuple(name for name, recipe in RECIPES.items() if needs_of(recipe) <= {"start", "on_step"})
_COMMON = ("recipe", "foreign", "exclude", "older")
# What does nothing here, and the reason or the way out.
_NOTHING = {
    "metric": "the metric is ++ingredient.monitor",
    "racing": "a validation loop gives one number for all samples together",
    "barrier": "its paths need predictions on single samples",
    "landscape": "its grid needs predictions on single samples",
    "grid": "there is no landscape",
    "batchnorm": (
        "only validation and test loops are run; measure the soup's statistics with your training data: "
        "torch.optim.swa_utils.update_bn(loader, model)"
    ),
    "batchnorm_batches": "BatchNorm statistics are not measured again here",
    "start": "the start is the module as the program makes it",
}


def check_options(options: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Check the `soup` section.

    Args:
        options: resolved.
        given: keys of the command line ("soup.ties").

    Raises:
        ConfigError: a recipe or an option that is unknown, or that would do nothing here.
    """
    recipe = str(options["recipe"])
    if recipe not in SCORED:
        raise ConfigError(
            f"soup.recipe={recipe} is not for programs of your own: their validation loop gives a score alone. "
            f"{did_you_mean(recipe, SCORED)}"
        )
    defaults = _defaults(recipe)
    known = [key for key in options_of(RECIPES[recipe]) if key not in _NOTHING]
    for key, value in options.items():
        if key in _NOTHING:
            if f"soup.{key}" in given or value != defaults.get(key, value):
                raise ConfigError(
                    f"soup.{key}={value} would do nothing in a program of your own: {_NOTHING[key]}. Leave it out."
                )
        elif key not in known and key not in _COMMON:
            raise ConfigError(
                f"soup.{key} is no option of the recipe {recipe}: {did_you_mean(key, [*known, *_COMMON])}"
            )
    if options.get("foreign", "refuse") not in ("refuse", "skip"):
        raise ConfigError(
            f"soup.foreign={options['foreign']}: {did_you_mean(str(options['foreign']), ('refuse', 'skip'))}"
        )
    if not isinstance(options.get("older", False), bool):
        raise ConfigError(f"soup.older={options['older']} must be true or false.")


def recipe_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the recipe takes."""
    return {key: options[key] for key in options_of(RECIPES[str(options["recipe"])]) if key in options}


def _defaults(recipe: str) -> dict[str, Any]:
    """Return the `soup` section as our configuration files have it, where the recipe has one."""
    folder = files("soups") / "conf" / "soup"
    found: dict[str, Any] = {}
    for place in (folder / "shared" / "base.yaml", folder / f"{recipe}.yaml"):
        if place.is_file():
            found |= cast(dict[str, Any], yaml.safe_load(place.read_text(encoding="utf-8")).get("soup", {}))
    return found
