"""What a finished soup is known by: one record on disk, from which the table, the figures and the tracked run are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from soups.errors import StorageError
from soups.evaluation import ood_mean
from soups.stores.files import write_json


class Row(BaseModel):
    """One model of the closing table.

    Attributes:
        name: shown to people.
        kind: "start", "ingredient", "mean", "best", "soup" or "ensemble".
        accuracy: in [0, 1], by split ("heldout", "test", then the OOD splits).
        loss: mean cross-entropy in nats, by split.
        note: why it is in the soup or not; how many models it needs at inference.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    accuracy: dict[str, float]
    loss: dict[str, float]
    note: str = ""

    @property
    def ood(self) -> float:
        """Mean accuracy over the OOD splits."""
        return ood_mean(self.accuracy)


class Decision(BaseModel):
    """One step of a search: scores are on the held-out split; `to_reach` is None for the first."""

    model_config = ConfigDict(extra="forbid")

    name: str
    own_score: float
    soup_score: float
    to_reach: float | None
    kept: bool


class Report(BaseModel):
    """A finished soup.

    Attributes:
        fingerprint: of recipe, settings and ingredients.
        recipe: its name.
        members: fingerprints of the ingredients in the soup, in the order they were added.
        ingredients: fingerprints of all that were tried.
        splits: names of the reported splits with their sizes, held-out first.
        rows: the closing table.
        steps: decisions of the greedy search.
        lineage: hashes of start, split, ingredients and soup; settings; versions.
        seconds: of the search and of the final evaluation.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    recipe: str
    metric: str
    members: list[str]
    ingredients: list[str]
    splits: dict[str, int]
    rows: list[Row]
    steps: list[Decision]
    lineage: dict[str, Any]
    seconds: dict[str, float]

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
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{path} cannot be read as a soup's report ({error}). Remove {folder} and run the same command again."
            ) from error
