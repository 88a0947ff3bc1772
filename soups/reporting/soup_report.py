"""The record of a finished soup, ours or another program's: its table, figures, page and tracked run are made from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

from soups.reporting.earlier import current_report
from soups.reporting.report import Report

# Names that their papers write otherwise.
_WRITTEN = {"top_k": "top-k", "diwa": "DiWA", "wise_ft": "WiSE-FT", "bcwi": "BCWI"}


def soup_name(recipe: str, first: bool = False) -> str:
    """Return what people are shown for a recipe's soup; with a capital letter when it comes first.

    >>> soup_name("greedy_removal", first=True), soup_name("wise_ft")
    ('Greedy removal soup', 'WiSE-FT soup')
    """
    name = f"{_WRITTEN.get(recipe, recipe.replace('_', ' '))} soup"
    return name[0].upper() + name[1:] if first else name


class Decision(BaseModel):
    """One step of a search: scores are on the held-out split; `to_reach` is None for the first.

    For `action` "remove" the score is the soup's without the ingredient, and `kept` says whether it was taken out.
    `evaluated` is the share of the held-out samples that the decision took.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    own_score: float
    soup_score: float
    to_reach: float | None
    kept: bool
    action: Literal["add", "remove"] = "add"
    evaluated: float = 1.0


class Difference(BaseModel):
    """A model against another on the same samples: difference in accuracy with its 95 % interval and test.

    `split` is a reported split, or "OOD" for the mean over the OOD splits, which has an interval and no test.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    against: str
    split: str
    value: float
    low: float
    high: float
    p_value: float | None = None
    test: str = ""


class Optimism(BaseModel):
    """How much too good the held-out score of a choice is: reported minus true, with 95 % of the rounds."""

    model_config = ConfigDict(extra="forbid")

    name: str
    value: float
    low: float
    high: float
    samples: int
    note: str = ""


class PathPoint(BaseModel):
    """A point of a searched path: its position, accuracy and loss by split."""

    model_config = ConfigDict(extra="forbid")

    position: float
    accuracy: dict[str, float]
    loss: dict[str, float]


class SoupReport(Report):
    """A finished soup, ours or another program's; the attributes of `Report` and these.

    Attributes:
        metric: the held-out metric that selected.
        mode: whether larger values of it are better ("max") or smaller ones ("min").
        members: fingerprints of the ingredients in the soup, in the order they were added.
        ingredients: fingerprints of all that were tried.
        steps: decisions of the recipe's search, or of the greedy one where it has none; `search` says whose.
        coefficients: the share of each ingredient, by its row's name, and of "start" where that takes part.
        by_tensor: shares by tensor and ingredient, where they differ between tensors.
        path, path_label: the points of a path that was searched, with accuracies that were measured after selection.
        differences: of soups and the best single model.
        optimism: what selection did to held-out scores.
        diversity: of the ingredients on the reported splits, by split and measure.
        evaluations: held-out scores that the recipe asked for.
        details: further findings of the recipe.
    """

    kind: Literal["soup"] = "soup"
    metric: str
    mode: Literal["max", "min"]
    members: list[str]
    ingredients: list[str]
    steps: list[Decision]
    search: str = "greedy"
    coefficients: dict[str, float] = Field(default_factory=dict[str, float])
    by_tensor: dict[str, dict[str, float]] = Field(default_factory=dict[str, dict[str, float]])
    path: list[PathPoint] = Field(default_factory=list[PathPoint])
    path_label: str = ""
    differences: list[Difference] = Field(default_factory=list[Difference])
    optimism: list[Optimism] = Field(default_factory=list[Optimism])
    diversity: dict[str, dict[str, float | None]] = Field(default_factory=dict[str, dict[str, float | None]])
    evaluations: int = 0
    details: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="before")
    @classmethod
    def _current(cls, value: Any) -> Any:
        return current_report(value)

    @computed_field
    @property
    def recipe(self) -> str:
        """The name of the recipe."""
        return self.name

    @property
    def classifies(self) -> bool:
        """Whether the models are classifiers whose accuracy and cross-entropy were measured, as in our own tasks."""
        return all("accuracy" in values for row in self.rows for values in row.metrics.values())

    @property
    def soup(self) -> str:
        """The name of the recipe's row."""
        return soup_name(self.recipe)

    def kept(self, name: str) -> bool:
        """Tell whether the ingredient of a row is in the soup."""
        if self.coefficients:
            return name in self.coefficients
        return any(member.startswith(name) for member in self.members)
