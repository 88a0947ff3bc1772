"""The section `soup`: what all recipes have in common, and the options of the chosen one, checked against its signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from soups.errors import ConfigError, did_you_mean
from soups.fitting.schema import Count, Flag, Must, Section, ShareBelowOne, checked
from soups.merging import METHODS, make_method
from soups.recipes import RECIPES, needs_of, options_of
from soups.recipes.bcwi import FORMS
from soups.recipes.diwa import SELECTIONS
from soups.recipes.learned import PER
from soups.recipes.recipe import TIES
from soups.recipes.wise_ft import ENDS

METRICS = ("accuracy", "loss")
# What `soup.batchnorm` may say: an average's statistics are averages too, or measured on training data.
AVERAGE, REESTIMATE = "average", "reestimate"
# What `soup.start` may say besides a path.
SHARED, PROBE = "shared", "probe"
# Options of recipes that take one of a few words.
_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ties": TIES, "selection": SELECTIONS, "per": PER, "form": FORMS, "end": ENDS}
)

# Which keys of the section would do nothing, and why.
Ignored = tuple[Callable[[str], bool], str]


class SoupOptions(Section):
    """How a soup is chosen from ingredients.

    Attributes:
        recipe: a name of `soups.recipes.RECIPES`.
        metric: the held-out metric that selects.
        foreign: what happens to ingredients of another base model, architecture or split.
        exclude: fingerprints (or their beginnings), or names of checkpoints, to leave out.
        batchnorm: running statistics of averages are averages, or measured anew on training data.
        batchnorm_batches: training batches for that.
        barrier, landscape: report the loss around the soup; `grid` points a side of the landscape.
        start: the model that the recipe interpolates from, or its base model: "shared", "probe" or a path.
        racing: stop a candidate of the greedy search early; see `soups.recipes.racing`.
        of_recipe: the recipe's own options.
    """

    recipe: str
    metric: Literal["accuracy", "loss"] = "accuracy"
    foreign: Literal["refuse", "skip"] = "refuse"
    exclude: list[str] = Field(default_factory=list[str])
    batchnorm: Literal["average", "reestimate"] = AVERAGE
    batchnorm_batches: Count = 32
    barrier: Flag = False
    landscape: Flag = False
    grid: Annotated[int, Field(ge=2), Must("a whole number of at least 2")] = 9
    start: str | None = None
    racing: (
        Annotated[ShareBelowOne, Must("0 (exact) or a chance below 1 that the soup is another, such as 0.05")] | None
    ) = None
    of_recipe: dict[str, Any] = Field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, section: Mapping[str, Any]) -> Self:
        """Return the section, checked.

        Raises:
            ConfigError: an unknown recipe, option or value, or a merge method that does not take its parameters.
        """
        recipe = str(section.get("recipe"))
        if recipe not in RECIPES:
            raise ConfigError(f"soup.recipe={recipe}: {did_you_mean(recipe, RECIPES)}")
        own = options_of(RECIPES[recipe])
        common = [name for name in cls.model_fields if name != "of_recipe" and _concerns(name, recipe)]
        if unknown := sorted(set(section) - set(own) - set(common)):
            raise ConfigError(
                f"soup.{unknown[0]} is no option of the recipe {recipe}: {did_you_mean(unknown[0], [*own, *common])}"
            )
        chosen = {key: section[key] for key in own if key in section}
        _check_values(recipe, chosen)
        plain = {key: value for key, value in section.items() if key in common}
        return checked(cls, {**plain, "of_recipe": chosen}, "soup.")

    @property
    def needs_start(self) -> bool:
        """Whether the recipe interpolates from a model, or has a base model."""
        return "start" in needs_of(RECIPES[self.recipe])

    @property
    def section(self) -> dict[str, Any]:
        """The section as it was given."""
        plain = self.plain()
        own = plain.pop("of_recipe")
        return {**plain, **own}

    def determinants(self) -> dict[str, Any]:
        """Return which options decide the soup or its report; the ingredients and the start are known by their weights."""
        left_out = {"foreign", "exclude", "start"}
        if self.batchnorm == AVERAGE:  # as before there was a choice: finished soups are found
            left_out |= {"batchnorm", "batchnorm_batches"}
        return {key: value for key, value in self.section.items() if key not in left_out}

    def ignored(self) -> list[Ignored]:
        """Return which keys of the configuration would do nothing beside these options, and why."""
        found: list[Ignored] = []
        if not self.landscape:
            found.append((lambda key: key == "soup.grid", "soup.landscape=false, so no landscape is drawn."))
        if self.batchnorm == AVERAGE:
            found.append(
                (lambda key: key == "soup.batchnorm_batches", "soup.batchnorm=average measures nothing on batches.")
            )
        return found


def common_options(recipe: str) -> list[str]:
    """Return what the section takes besides the options of a recipe."""
    return [name for name in SoupOptions.model_fields if name != "of_recipe" and _concerns(name, recipe)]


def _concerns(name: str, recipe: str) -> bool:
    if name == "racing":
        return recipe == "greedy"
    return name != "start" or "start" in needs_of(RECIPES[recipe])


def _check_values(recipe: str, chosen: Mapping[str, Any]) -> None:
    """Check a recipe's options before anything is trained for it."""
    hints = get_type_hints(RECIPES[recipe])
    for key, value in chosen.items():
        if key in _WORDS:
            if value not in _WORDS[key]:
                raise ConfigError(f"soup.{key}={value}: {did_you_mean(str(value), _WORDS[key])}")
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"soup.{key}={value}: {error.errors()[0]['msg']}.") from None
    if recipe == "merge":
        _check_method(str(chosen.get("method", "ties")), chosen.get("parameters") or {})


def _check_method(name: str, parameters: Mapping[str, Any]) -> None:
    if name not in METHODS:
        raise ConfigError(f"soup.method={name}: {did_you_mean(name, METHODS)}")
    for key, value in parameters.items():
        for candidate in value if isinstance(value, list) and value else [value]:
            make_method(name, **{key: candidate})
