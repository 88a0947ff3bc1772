"""The record of a finished soup, ours or another program's: its table, figures, page and tracked run are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from soups.errors import StorageError
from soups.evaluation import ood_mean
from soups.reporting.earlier import current_report, current_row
from soups.stores.files import write_json

# Names that their papers write otherwise.
_WRITTEN = {"top_k": "top-k", "diwa": "DiWA", "wise_ft": "WiSE-FT", "bcwi": "BCWI"}


def soup_name(recipe: str, first: bool = False) -> str:
    """Return what people are shown for a recipe's soup; with a capital letter when it comes first.

    >>> soup_name("greedy_removal", first=True), soup_name("wise_ft")
    ('Greedy removal soup', 'WiSE-FT soup')
    """
    name = f"{_WRITTEN.get(recipe, recipe.replace('_', ' '))} soup"
    return name[0].upper() + name[1:] if first else name


class Row(BaseModel):
    """One model of the closing table.

    Attributes:
        name: shown to people.
        kind: "start", "ingredient", "mean", "best", "soup" or "ensemble".
        metrics: by split ("heldout", "test", then the OOD splits), then by name. Our own tasks have "accuracy" in [0, 1]
            and "loss", the mean cross-entropy in nats; other programs have the names that they log.
        note: why it is in the soup or not; how many models it needs at inference.
        interval: 95 % interval of the accuracy, by split; none for a mean of models.
        settings: of an ingredient: those that differ among the ingredients.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    metrics: dict[str, dict[str, float]]
    note: str = ""
    interval: dict[str, tuple[float, float]] = Field(default_factory=dict[str, tuple[float, float]])
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="before")
    @classmethod
    def _current(cls, value: Any) -> Any:
        return current_row(value)

    @computed_field
    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy in [0, 1], by split; empty where that is not a metric of the task."""
        return self._by_split("accuracy")

    @computed_field
    @property
    def loss(self) -> dict[str, float]:
        """Mean cross-entropy in nats, by split; empty where that is not a metric of the task."""
        return self._by_split("loss")

    @property
    def ood(self) -> float:
        """Mean accuracy over the OOD splits."""
        return ood_mean(self.accuracy)

    def value(self, split: str, metric: str) -> float | None:
        """Return a metric on a split, or None where it was not measured."""
        return self.metrics.get(split, {}).get(metric)

    def _by_split(self, metric: str) -> dict[str, float]:
        return {split: values[metric] for split, values in self.metrics.items() if metric in values}


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


class Report(BaseModel):
    """A finished soup.

    Attributes:
        fingerprint: of recipe, settings and ingredients.
        recipe: its name.
        metric: the held-out metric that selected.
        mode: whether larger values of it are better ("max") or smaller ones ("min").
        members: fingerprints of the ingredients in the soup, in the order they were added.
        ingredients: fingerprints of all that were tried.
        splits: names of the reported splits with their numbers of samples, held-out first; 0 where that is not known.
        rows: the closing table.
        steps: decisions of the recipe's search, or of the greedy one where it has none; `search` says whose.
        lineage: hashes of start, split, ingredients and soup; settings; versions.
        seconds: of the search and of the final evaluation.
        coefficients: the share of each ingredient, by its row's name, and of "start" where that takes part.
        by_tensor: shares by tensor and ingredient, where they differ between tensors.
        path, path_label: the points of a path that was searched, with accuracies that were measured after selection.
        differences: of soups and the best single model.
        optimism: what selection did to held-out scores.
        diversity: of the ingredients on the reported splits, by split and measure.
        evaluations: held-out scores that the recipe asked for.
        warnings: what a careful reader must know.
        details: further findings of the recipe.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    recipe: str
    metric: str
    mode: Literal["max", "min"]
    members: list[str]
    ingredients: list[str]
    splits: dict[str, int]
    rows: list[Row]
    steps: list[Decision]
    lineage: dict[str, Any]
    seconds: dict[str, float]
    search: str = "greedy"
    coefficients: dict[str, float] = Field(default_factory=dict[str, float])
    by_tensor: dict[str, dict[str, float]] = Field(default_factory=dict[str, dict[str, float]])
    path: list[PathPoint] = Field(default_factory=list[PathPoint])
    path_label: str = ""
    differences: list[Difference] = Field(default_factory=list[Difference])
    optimism: list[Optimism] = Field(default_factory=list[Optimism])
    diversity: dict[str, dict[str, float | None]] = Field(default_factory=dict[str, dict[str, float | None]])
    evaluations: int = 0
    warnings: list[str] = Field(default_factory=list[str])
    details: dict[str, Any] = Field(default_factory=dict[str, Any])

    @model_validator(mode="before")
    @classmethod
    def _current(cls, value: Any) -> Any:
        return current_report(value)

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

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    def save(self, folder: Path) -> None:
        """Write `report.json` into a folder."""
        write_json(folder / "report.json", self.model_dump(mode="json"))

    @staticmethod
    def load(folder: Path) -> Report:
        """Read `report.json` from a folder.

        Raises:
            StorageError: it is absent or not whole.
        """
        path = folder / "report.json"
        try:
            return Report.model_validate_json(path.read_text())
        except OSError as error:
            raise StorageError(f"{path} cannot be read as a soup's report ({error}).") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise StorageError(
                f"{path} cannot be read as a soup's report: {where}: {first['msg']} ({error.error_count()} faults in all). "
                f"If a run of this program was cut off while it wrote {folder}, remove that folder and run the same command "
                f"again; a folder that something else wrote is best left alone."
            ) from error
