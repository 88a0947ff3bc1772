"""The record of a finished run: a soup, ours or another program's, or a protocol. Tables, figures and pages are made from it.

`SoupReport` and `ProtocolReport` add the content that only one of them has. See the README for the reasons.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from soups.errors import StorageError
from soups.evaluation import ood_mean
from soups.reporting.earlier import current_row
from soups.stores.files import write_json

# The record's file in the folder of a finished run.
RECORD_FILE = "report.json"


class Row(BaseModel):
    """One model with its metrics.

    Attributes:
        name: shown to people.
        kind: "start", "ingredient", "mean" (of several models), "best" (of the ingredients), "soup" (an average of weights),
            "ensemble" (an average of predictions) or "model" (any other).
        metrics: by split ("heldout", "test", then the OOD splits), then by name. Our own tasks have "accuracy" in [0, 1]
            and "loss", the mean cross-entropy in nats; other programs have the names that they log. A protocol may have
            tasks or domains in place of splits.
        note: why it is in the soup or not; how many models it needs at inference.
        interval: 95 % interval of the accuracy, by split; none for a mean of models.
        settings: those that differ among the models.
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


class Report(BaseModel):
    """A finished run; `kind`, which each class below adds, says which of them reads the record.

    Attributes:
        fingerprint: SHA-256 (hex) of everything that decides the run's result.
        name: of the recipe or the protocol.
        settings: resolved settings of the command.
        versions: of this code and of the libraries that training runs through.
        pool: path or URL of the pool with the trained models.
        splits: names of the reported splits with their numbers of samples; 0 where the number is not known.
        rows: the models with their metrics.
        lineage: hashes of the inputs and the results.
        seconds: by phase.
        warnings: facts that a careful reader must know.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    name: str
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    versions: dict[str, str] = Field(default_factory=dict[str, str])
    pool: str = ""
    splits: dict[str, int]
    rows: list[Row]
    lineage: dict[str, Any]
    seconds: dict[str, float]
    warnings: list[str] = Field(default_factory=list[str])

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    def save(self, folder: Path) -> None:
        """Write `report.json` into a folder."""
        write_json(folder / RECORD_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `report.json` from a folder.

        Raises:
            StorageError: it is absent, not whole or of another kind.
        """
        path = folder / RECORD_FILE
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as error:
            raise StorageError(f"{path} cannot be read as a report ({error}).") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise StorageError(
                f"{path} cannot be read as a report: {where}: {first['msg']} ({error.error_count()} faults in all). "
                f"If a run of this program was cut off while it wrote {folder}, remove that folder and run the same command "
                f"again; a folder that something else wrote is best left alone."
            ) from error
