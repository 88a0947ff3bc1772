"""Screening: which pushed contributions may enter a round, and why the others may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from soups.errors import SoupError
from soups.protocols.cold_fusion.records import Contribution, Manifest, Policy, Verdict
from soups.protocols.cold_fusion.reduction import update_norm
from soups.stores.safetensors import DTYPE_NAMES
from soups.stores.store import Store


def misfit(manifest: Manifest, weights: Store) -> str:
    """Return the first fault in the names, shapes and dtypes of some weights; the empty string if there is none.

    Further tensors (heads) are no fault; the caller leaves them out.
    """
    names = set(weights.keys())
    missing = [name for name in manifest.tensors if name not in names]
    if missing:
        return f"{len(missing)} of {len(manifest.tensors)} tensors are missing, the first {missing[0]!r}"
    for name, (dtype, shape) in manifest.tensors.items():
        meta = weights.meta(name)
        if list(meta.shape) != shape:
            return f"{name!r} has shape {tuple(meta.shape)}, {tuple(shape)} was expected (another architecture or vocabulary)"
        if (found := DTYPE_NAMES.get(meta.dtype, str(meta.dtype))) != dtype:
            return f"{name!r} is {found}, {dtype} was expected"
    return ""


@dataclass(frozen=True)
class PendingUpdate:
    """A pushed contribution, opened.

    Attributes:
        contribution: its record.
        weights: the pushed weights, or the error of reading them.
        start: the base it started from; None when that base was never here.
        started: the number of that base.
        score: its held-out score, where the fuser has one.
    """

    contribution: Contribution
    weights: Store | SoupError
    start: Store | None
    started: int | None
    score: float | None = None


def screen(
    manifest: Manifest,
    policy: Policy,
    candidates: Sequence[PendingUpdate],
    current: int,
    known_norms: Sequence[float] = (),
    base_score: float | None = None,
) -> list[Verdict]:
    """Judge the candidates of a round, in their order.

    Each is looked at by itself (readable, fitting, finite, a base that was here, not too old, held-out score), then the
    norms of the updates are compared: with the lower median over this round and `known_norms`, so that in a round of two
    the larger one cannot speak for itself.

    Args:
        manifest: of the repository.
        policy: in force.
        candidates: the pushed contributions.
        current: number of the current base.
        known_norms: norms of the updates that the round before accepted.
        base_score: the held-out score of the current base, where the fuser has one.
    """
    verdicts = [_alone(manifest, policy, candidate, current, base_score) for candidate in candidates]
    norms = [verdict.norm for verdict in verdicts if verdict.accepted and verdict.norm is not None]
    if not norms:
        return verdicts
    usual = median_low([*norms, *known_norms])
    return [_compared(policy, verdict, usual) for verdict in verdicts]


def _alone(
    manifest: Manifest, policy: Policy, candidate: PendingUpdate, current: int, base_score: float | None
) -> Verdict:
    record = candidate.contribution
    fields: dict[str, Any] = {"id": record.id, "contributor": record.contributor, "started": candidate.started}
    if isinstance(candidate.weights, SoupError):
        return Verdict(**fields, accepted=False, reason=f"cannot be read: {candidate.weights}")
    if problem := misfit(manifest, candidate.weights):
        return Verdict(**fields, accepted=False, reason=problem)
    if candidate.start is None or candidate.started is None:
        return Verdict(**fields, accepted=False, reason=f"it names base {record.base[:12]}, which was never here")
    norm = update_norm(candidate.weights, candidate.start)
    if not math.isfinite(norm):
        return Verdict(**fields, accepted=False, reason="it holds values that are not finite")
    fields["norm"] = norm
    age = current - candidate.started
    if age and policy.stale == "refuse":
        return Verdict(**fields, accepted=False, reason=f"stale: it started {age} rounds ago")
    if policy.max_age is not None and age > policy.max_age:
        return Verdict(
            **fields, accepted=False, reason=f"stale: it started {age} rounds ago, {policy.max_age} are allowed"
        )
    if candidate.score is not None and base_score is not None and not candidate.score >= base_score - policy.tolerance:
        reason = f"held-out score {candidate.score:.4g}, the base has {base_score:.4g}"
        return Verdict(**fields, accepted=False, reason=reason)
    return Verdict(**fields, accepted=True)


def _compared(policy: Policy, verdict: Verdict, usual: float) -> Verdict:
    if not verdict.accepted or verdict.norm is None:
        return verdict
    if policy.max_norm is not None and verdict.norm > policy.max_norm * usual:
        reason = f"update norm {verdict.norm:.4g} is {verdict.norm / usual if usual else math.inf:.3g} times the median"
        return verdict.model_copy(update={"accepted": False, "reason": f"{reason}; {policy.max_norm:g} is the most"})
    if policy.clip is not None and verdict.norm > policy.clip * usual:
        return verdict.model_copy(update={"scale": policy.clip * usual / verdict.norm})
    return verdict


def accepted_norms(verdicts: Sequence[Verdict]) -> list[float]:
    """Return the norms of the accepted updates."""
    return [verdict.norm for verdict in verdicts if verdict.accepted and verdict.norm is not None]
