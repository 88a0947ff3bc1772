"""Searching without gradients: points are proposed, made into weights, and scored; the best is kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from torch import Tensor

from soups.coefficients.optimisers import Optimiser
from soups.errors import ConfigError, StorageError

Proposal = TypeVar("Proposal")
Score = Callable[[dict[str, Tensor]], float]


class ScoredPoint(NamedTuple, Generic[Proposal]):
    """A point that was tried, and its score."""

    point: Proposal
    score: float


class Found(NamedTuple, Generic[Proposal]):
    """The outcome of a search.

    Attributes:
        best: the chosen trial.
        weights: its weights.
        trials: all trials, in order.
    """

    best: ScoredPoint[Proposal]
    weights: dict[str, Tensor]
    trials: list[ScoredPoint[Proposal]]


def search(
    make: Callable[[Proposal], dict[str, Tensor]],
    score: Score,
    optimiser: Optimiser[Proposal],
    *,
    prefer: Callable[[Proposal], float] = lambda point: 0.0,
    journal: Path | None = None,
    fingerprint: str = "",
    on_trial: Callable[[ScoredPoint[Proposal]], None] = lambda trial: None,
) -> Found[Proposal]:
    """Try the points that an optimiser proposes and keep the best.

    One model is in memory beside the best so far.

    Args:
        make: from a point to weights that the caller may keep.
        score: of some weights; larger is better; NaN counts as the worst.
        optimiser: proposes the points.
        prefer: among equal scores the point of the larger value wins, and among those the first.
        journal: a file that holds the trials; a search that was interrupted reads it and goes on, to the same result.
        fingerprint: of everything that decides the scores; a journal of another is refused.
        on_trial: called after each trial.

    Raises:
        ConfigError: the optimiser proposed nothing.
        StorageError: the journal is of another search.
    """
    recorded = _read(journal, fingerprint) if journal else []
    trials: list[ScoredPoint[Proposal]] = []
    best: ScoredPoint[Proposal] | None = None
    kept: dict[str, Tensor] | None = None
    while (point := optimiser.ask()) is not None:
        made: dict[str, Tensor] | None = None
        if len(trials) < len(recorded):
            tried, value = recorded[len(trials)]
            if tried != json.loads(json.dumps(point)):
                raise StorageError(
                    f"{journal} holds other points than this search proposes; remove it, or name another."
                )
        else:
            made = make(point)
            value = float(score(made))
            if journal:
                _append(journal, fingerprint, point, value)
        trial = ScoredPoint(point, value)
        trials.append(trial)
        optimiser.tell(point, value)
        on_trial(trial)
        if best is None or _rank(trial, prefer) > _rank(best, prefer):
            best, kept = trial, made
    if best is None:
        raise ConfigError("The search proposed nothing to try.")
    return Found(best, make(best.point) if kept is None else kept, trials)


def _rank(trial: ScoredPoint[Proposal], prefer: Callable[[Proposal], float]) -> tuple[bool, float, float]:
    known = not math.isnan(trial.score)
    return known, trial.score if known else 0.0, prefer(trial.point)


def _read(journal: Path, fingerprint: str) -> list[tuple[Any, float]]:
    """Return the recorded trials; a last line that was cut by a crash does not count."""
    if not journal.exists():
        return []
    lines = journal.read_text().split("\n")[:-1]
    entries = [cast("Mapping[str, Any]", json.loads(line)) for line in lines]
    if entries and entries[0].get("fingerprint") != fingerprint:
        raise StorageError(
            f"{journal} belongs to a search over other models, data or settings; remove it, or name another."
        )
    whole = "".join(f"{line}\n" for line in lines)
    if whole != journal.read_text():
        journal.write_text(whole)
    return [(entry["point"], float(entry["score"])) for entry in entries[1:]]


def _append(journal: Path, fingerprint: str, point: Any, value: float) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    header = "" if journal.exists() and journal.stat().st_size else json.dumps({"fingerprint": fingerprint}) + "\n"
    with journal.open("a") as file:
        file.write(header + json.dumps({"point": point, "score": value}) + "\n")
        file.flush()
        os.fsync(file.fileno())
