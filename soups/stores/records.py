"""What a pool keeps about a fine-tuned model, and about a run that failed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

WEIGHTS, RECORD = "weights.safetensors", "record.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Ingredient(BaseModel):
    """What the pool knows of a fine-tuned model.

    Attributes:
        fingerprint: hash of `determinants`; the ingredient's name.
        determinants: the settings, data and start that decide the weights.
        config: the whole resolved configuration, also what does not decide the weights.
        start: weights hash of the model that fine-tuning started from.
        architecture: hash of names, dtypes and shapes.
        split: hash of the train, held-out and test splits and the class names.
        weights: hash of the weights; `file` is the name of their file, `file_sha256` and `file_bytes` are that file's.
        metrics: by split, then by name ("accuracy" in [0, 1], "loss" in nats, "count").
        durations: in seconds, by phase.
        versions: of the libraries and of this code.
        layout: what the run ran on: devices, strategy, threads, host.
        created: UTC, ISO 8601.
        notes: anything else worth keeping (the probe's penalty, the averages' names).
        history: values by epoch ("epoch", "step", "train/loss", "heldout/accuracy", "heldout/loss"), as far as measured.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    determinants: dict[str, Any]
    config: dict[str, Any] = Field(default_factory=dict)
    start: str | None = None
    architecture: str = ""
    split: str = ""
    weights: str = ""
    file: str = WEIGHTS
    file_sha256: str = ""
    file_bytes: int = 0
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    durations: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    layout: dict[str, Any] = Field(default_factory=dict)
    created: str = Field(default_factory=_now)
    notes: dict[str, Any] = Field(default_factory=dict)
    history: list[dict[str, float]] = Field(default_factory=list[dict[str, float]])

    @property
    def short(self) -> str:
        """What people are shown: the name of a checkpoint from elsewhere, else eight characters of the fingerprint."""
        return str(self.notes.get("name", self.fingerprint[:8]))

    def heldout(self, metric: str = "accuracy") -> float:
        """Return a metric on the held-out split."""
        return self.metrics["heldout"][metric]


class Failure(BaseModel):
    """Why a run failed."""

    fingerprint: str
    error: str
    determinants: dict[str, Any]
    created: str = Field(default_factory=_now)
