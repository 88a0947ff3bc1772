"""The plan of a merge: which tensors are made, by which method, of what. It is made from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from soups.errors import ConfigError, WeightsError
from soups.merging.attaching import Attachments
from soups.merging.job import Job
from soups.merging.keeping import is_kept, keep_hint, kept_names, kept_ties
from soups.merging.method import Method
from soups.merging.methods import make_method
from soups.merging.operands import Source
from soups.statistics import Statistics
from soups.stores.files import fingerprint
from soups.stores.store import Store, TensorMeta, headers
from soups.weights import describe_mismatch

Methods = Method | str | Mapping[str, Method | str]
"""A method, its name, or either by pattern of tensor names."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, from headers alone.

    Attributes:
        jobs: one for each tensor of the output.
        tied: names that repeat another one.
    """

    jobs: tuple[Job, ...]
    tied: dict[str, str]

    def fingerprint(self, **more: Any) -> str | None:
        """Return a hash of what decides the output's bits: methods, tensors, the sources' files and their times of change.

        `None` where a source is in memory, which only a look at its contents could tell from another.

        Args:
            more: what else decides.
        """
        entries: list[Any] = []
        for job in self.jobs:
            places = [source.store.identity(source.key) for source in sources_of(job)]
            if any(place is None for place in places):
                return None
            dtype = str(job.meta.dtype)
            read: dict[str, Any] = {}
            for kind, found in job.statistics.items():
                identities = [one.store.identity(one.key) for one in found]
                if any(identity is None for identity in identities):
                    return None
                read[kind] = [[identity, one.terms] for identity, one in zip(identities, found, strict=True)]
            entries.append([job.key, job.meta.shape, dtype, repr(job.method), job.base is not None, places, read])
        return fingerprint({"format": 2, "torch": torch.__version__, "jobs": entries, "tied": self.tied, **more})

    @property
    def outputs(self) -> dict[str, TensorMeta]:
        """Name, shape and dtype of each tensor that is written."""
        return {job.key: job.meta for job in self.jobs}

    @property
    def bytes_to_read(self) -> int:
        """Bytes of one visit to every source; methods that look at tensors first visit them more than once."""
        return sum(job.nbytes() for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the output's tensors."""
        return sum(job.meta.nbytes for job in self.jobs)


def plan_merge(
    method: Methods,
    models: Sequence[Store],
    base: Store | None = None,
    *,
    dtype: torch.dtype | None = None,
    statistics: Sequence[Statistics] | None = None,
    keep: Sequence[str] = (),
) -> MergePlan:
    """Check that models fit each other and return what is to be made of which tensors. Only headers are read.

    That statistics are of these models' weights is for the caller to check (`soups.merging.attaching.check_weights`).

    Args:
        method: one for everything; or by pattern of tensor names, the first that matches: tensors that match none are the
            base's, or the first model's.
        models: the stores.
        base: the base model's.
        dtype: of the output's floating tensors; the base's (or first model's) when `None`.
        statistics: each model's, in the order of the models, for methods that need them.
        keep: patterns of tensor names. Tensors that match are the base's (or first model's) as they are, dtype included, and
            are ignored in the other models.

    Raises:
        WeightsError: models differ in names, shapes or kinds of tensors that are not kept; complex numbers that a method cannot merge; statistics of other
            weights, of other shapes, or of some models only.
        ConfigError: the number of models, the lack of a base or of statistics does not suit a method;
            a pattern of `keep` matches no tensor.
    """
    if not models:
        raise ConfigError("A merge needs at least one model.")
    donor = base or models[0]
    rules = {"*": method} if isinstance(method, Method | str) else dict(method)
    made = {pattern: make_method(rule) if isinstance(rule, str) else rule for pattern, rule in rules.items()}
    for pattern, rule in made.items():
        rule.check(
            len(models), has_base=base is not None, name=_name(rule) + ("" if pattern == "*" else f" for {pattern!r}")
        )
    attached = Attachments(list(made.values()), models, statistics)
    kept = set(kept_names(donor, models, keep))
    expected = headers(donor, [key for key in donor if key not in kept])
    for store in models:
        found = headers(store, [key for key in store if not is_kept(key, keep)])
        if problem := describe_mismatch(expected, found):
            raise WeightsError(
                f"{store.location} does not fit {donor.location}: {problem}. Models that are merged need the same "
                f"architecture, head included. Map tensors that are the same under other names by rename; else leave this one "
                f"out, or fine-tune it again from the shared base.{keep_hint(expected, found)}"
            )
    tied = _tied(donor, models, kept)
    jobs: list[Job] = []
    used: set[str] = set()
    for key in donor:
        pattern = None if key in kept else next((pattern for pattern in made if fnmatchcase(key, pattern)), None)
        if pattern:
            used.add(pattern)
        if key in tied:
            continue
        meta = donor.meta(key)
        if not is_averaged_dtype(meta.dtype) or pattern is None:
            jobs.append(Job(key, meta, None, (Source(donor, key),)))
            continue
        rule = made[pattern]
        check_complex(rule, meta, key, donor)
        out = TensorMeta(meta.shape, output_dtype(donor.declared_dtype(key), dtype))
        sources = tuple(Source(store, key) for store in models)
        names = [key, *(name for name, first in tied.items() if first == key)]
        read = attached.of(rule, [(number, names) for number in range(len(models))], meta)
        jobs.append(Job(key, out, rule, sources, Source(base, key) if base else None, read))
    unused = [pattern for pattern in made if pattern not in used]
    if unused:
        raise ConfigError(
            f"The pattern {unused[0]!r} matches no tensor of {donor.location}, or only after an earlier one."
        )
    attached.check_used()
    return MergePlan(tuple(jobs), tied)


def is_averaged_dtype(dtype: torch.dtype) -> bool:
    """Tell whether tensors of a dtype are merged: floating and complex ones are, integer and bool ones are copied."""
    return dtype.is_floating_point or dtype.is_complex


def output_dtype(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a merged tensor: the one asked for, or its own; complex tensors keep theirs."""
    return own if asked is None or own.is_complex else asked


def check_complex(method: Method, meta: TensorMeta, key: str, donor: Store) -> None:
    """Check that a method can merge a tensor's numbers.

    Raises:
        WeightsError: they are complex, and it cannot.
    """
    if meta.dtype.is_complex and not method.complex:
        raise WeightsError(
            f"{donor.location}: {key!r} holds complex numbers, which {_name(method)} cannot merge; 'linear' and 'passthrough' "
            f"can. Merge these tensors by one of them, by pattern of names."
        )


def sources_of(job: Job) -> list[Source]:
    """Return where a tensor of the models and of the base is."""
    return [*job.models, *([job.base] if job.base else [])]


def _name(method: Method) -> str:
    return type(method).__name__


def _tied(donor: Store, models: Sequence[Store], kept: Set[str]) -> dict[str, str]:
    """Names that are tied in every model: one that was untied by training is merged by itself."""
    common = {name: first for name, first in donor.tied().items() if name not in kept and first not in kept}
    for store in models:
        # The same pair may be the other way round, so what counts is the representative.
        tied = store.tied()
        common = {a: b for a, b in common.items() if tied.get(a, a) == tied.get(b, b)}
    return common | kept_ties(donor, kept)
