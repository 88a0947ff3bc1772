"""A page: what a finished soup, protocol or merge shows, as data. Terminal, figures and HTML are drawn from it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soups.errors import StorageError
from soups.stores.files import write_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str
    note: str = ""


class Cell(BaseModel):
    """A number of a table with its 95 % interval, in the unit of its column."""

    model_config = ConfigDict(extra="forbid")

    value: float
    low: float | None = None
    high: float | None = None


def p_value_text(value: float) -> str:
    """Return a p-value for people: three decimals, or that it is smaller than they can say.

    >>> p_value_text(0.04321), p_value_text(2e-7), p_value_text(1.0)
    ('0.043', '< 0.001', '1.000')
    """
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


class Table(_Part):
    """Rows of texts and numbers.

    Attributes:
        columns: headings; "accuracy, %" gives the unit after a comma, and "p" is a column of p-values.
        rows: one value a column; a number may carry an interval, None is an empty cell.
        highlight: numbers of the rows to stress.
    """

    kind: Literal["table"] = "table"
    columns: list[str]
    rows: list[list[Cell | float | int | str | None]]
    highlight: list[int] = Field(default_factory=list[int])


class Curves(_Part):
    """Lines over one axis: training curves, a barrier, best-of-N, rounds.

    Attributes:
        x: (N,).
        series: (N,) by name; None where there is no value.
        low, high: bounds of the 95 % interval by name, where known.
        log_x: draw the x-axis on a logarithmic scale.
    """

    kind: Literal["curves"] = "curves"
    x_label: str
    y_label: str
    x: list[float]
    series: dict[str, list[float | None]]
    low: dict[str, list[float | None]] = Field(default_factory=dict[str, list[float | None]])
    high: dict[str, list[float | None]] = Field(default_factory=dict[str, list[float | None]])
    log_x: bool = False


class Matrix(_Part):
    """A heatmap: pairwise distance, agreement, a two-dimensional loss landscape.

    Attributes:
        row_labels, column_labels: of the axes.
        values: (rows, columns).
    """

    kind: Literal["matrix"] = "matrix"
    row_labels: list[str]
    column_labels: list[str]
    values: list[list[float | None]]
    value_label: str = ""


class ChartPoint(BaseModel):
    """One point of a scatter plot and what is shown when the pointer is on it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    x: float
    y: float
    details: dict[str, str] = Field(default_factory=dict[str, str])


class Scatter(_Part):
    """Points by group: in-distribution against OOD accuracy, a front of two rewards."""

    kind: Literal["scatter"] = "scatter"
    x_label: str
    y_label: str
    groups: dict[str, list[ChartPoint]]
    connect: list[str] = Field(default_factory=list[str])


class Steps(_Part):
    """Decisions of a search in their order: the candidate, the score with it, the score to reach, and whether it stayed."""

    kind: Literal["steps"] = "steps"
    score_label: str
    names: list[str]
    scores: list[float]
    to_reach: list[float | None]
    kept: list[bool]


Part = Annotated[Table | Curves | Matrix | Scatter | Steps, Field(discriminator="kind")]


class Page(BaseModel):
    """Everything a report page shows.

    Attributes:
        title: of the page.
        subject: "soup", "protocol" or "merge".
        summary: one or two sentences with the finding.
        warnings: what a careful reader must know; shown first.
        parts: tables and figures in their order.
        configs: resolved settings by ingredient or member; the page shows where they differ.
        lineage: hashes of what went in and came out.
        environment: versions, machine.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    subject: Literal["soup", "protocol", "merge"]
    summary: str
    warnings: list[str] = Field(default_factory=list[str])
    parts: list[Part] = Field(default_factory=list[Part])
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    lineage: dict[str, Any] = Field(default_factory=dict[str, Any])
    environment: dict[str, str] = Field(default_factory=dict[str, str])

    def save(self, folder: Path) -> None:
        """Write `page.json` into a folder."""
        write_json(folder / "page.json", self.model_dump(mode="json"))

    @staticmethod
    def load(folder: Path) -> Page:
        """Read `page.json` from a folder.

        Raises:
            StorageError: it is absent or not whole.
        """
        path = folder / "page.json"
        try:
            return Page.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise StorageError(f"{path} cannot be read as a report page ({error}). Run the command again.") from error
