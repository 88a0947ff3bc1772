"""What a repository writes down: its rules, each push, each round. Records are created once and never changed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(_Record):
    """How a repository screens and fuses.

    Attributes:
        quorum: contributions that must pass the screening before a round is made.
        method: merge method that reduces them, by name: linear (mean), median, trimmed_mean, or any other.
        parameters: of the method.
        clip: shorten each update to this multiple of the round's median norm; None leaves them as they are.
        max_norm: refuse updates whose norm is above this multiple of the round's median; None refuses none for that.
        stale: what happens to a contribution that started from an earlier base: "rebase" adds its update to the current
            base, "refuse" leaves it out.
        max_age: refuse contributions that started more than so many rounds ago; None refuses none for that.
        tolerance: how much lower than the base's a contribution's held-out score may be, where fusers have such a score.
    """

    quorum: int = Field(default=2, ge=1)
    method: str = "linear"
    parameters: dict[str, Any] = Field(default_factory=dict[str, Any])
    clip: float | None = Field(default=None, gt=0)
    max_norm: float | None = Field(default=4.0, gt=0)
    stale: Literal["rebase", "refuse"] = "rebase"
    max_age: int | None = Field(default=None, ge=0)
    tolerance: float = 0.0


class Manifest(_Record):
    """What a repository is of; written when it is made.

    Attributes:
        base: hash of the shared part of base 0.
        frozen: hash of the part that nobody trains, stored once; None when everything is shared.
        tensors: name to [dtype, shape] of the shared part.
        tokenizer: SHA-256 of the tokenizer that goes with the weights, where one does.
        policy: how to screen and fuse.
    """

    version: Literal[1] = 1
    base: str
    frozen: str | None
    tensors: dict[str, tuple[str, list[int]]]
    tokenizer: str | None
    policy: Policy
    created: str = Field(default_factory=_now)


class Contribution(_Record):
    """One push; the record is written after the weights, so a push that was cut off is no push.

    Attributes:
        id: fingerprint of contributor, base and weights: the same push twice is one contribution.
        contributor: who.
        base: hash of the base it started from.
        weights: hash of the shared part.
        nbytes: size of the file.
        note: anything the contributor wants to say (task, number of examples, scores); not used.
    """

    id: str
    contributor: str
    base: str
    weights: str
    nbytes: int
    note: dict[str, Any] = Field(default_factory=dict[str, Any])
    created: str = Field(default_factory=_now)


class Verdict(_Record):
    """What a round did with a contribution.

    Attributes:
        id: the contribution.
        contributor: who made it.
        accepted: whether it is in the new base.
        reason: why not.
        started: number of the base it started from; None when that base was never here.
        norm: L2 norm of its update; None when it could not be measured.
        scale: factor on its update (clipping).
    """

    id: str
    contributor: str
    accepted: bool
    reason: str = ""
    started: int | None = None
    norm: float | None = None
    scale: float = 1.0


class Round(_Record):
    """One round; its record is created exclusively, so that one fuser's result counts.

    Attributes:
        number: 1, 2, …
        base: hash of the base that was updated.
        result: hash of the new base.
        policy: in force.
        verdicts: every contribution that this round used up, in the order of their ids, in which they were summed.
        fuser: who fused.
    """

    number: int
    base: str
    result: str
    policy: Policy
    verdicts: list[Verdict]
    fuser: str = ""
    created: str = Field(default_factory=_now)

    @property
    def accepted(self) -> list[Verdict]:
        """The verdicts of what is in the new base."""
        return [verdict for verdict in self.verdicts if verdict.accepted]
