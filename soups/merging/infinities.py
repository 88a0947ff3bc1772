"""Infinities that all models share (masks of attention): they stay as they are, and everything else is merged around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.merging import kernels
from soups.merging.job import Infinities, Job
from soups.merging.operands import Source
from soups.stores.store import Store
from soups.stores.views import StoreView

# Elements that are looked at in one piece.
_PIECE = 1 << 19


class FiniteStore(StoreView):
    """A store that shows zeros where a tensor holds an infinity that all models share.

    Args:
        store: the store to read from.
        key: the tensor.
        infinities: where they are.
    """

    def __init__(self, store: Store, key: str, infinities: Infinities) -> None:
        super().__init__(store)
        self._name, self._infinities = self.source(key), infinities

    def changes(self, name: str) -> bool:
        """Tell whether this is the tensor."""
        return name == self._name

    def compute(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`, with zeros in the places of infinities."""
        values = self.store.read_flat(name, start, stop).clone()
        values[self._infinities.between(start, stop)[0]] = 0
        return values


def without_shared_infinities(job: Job) -> Job:
    """Return a job in which the infinities that all models share are zeros, and are put back into the result.

    A tensor that is the same in every model is copied instead: it has no task vector, and has no part in what methods find
    out about the rest of the model. One model is read once; the others are where it holds infinities.

    Raises:
        WeightsError: infinities that other models do not share.
    """
    if job.method is None or not job.models:
        return job
    donor, others = _sources(job)
    numel = donor.store.meta(donor.key).numel
    if not any(_has_infinities(_read(donor, *span)) for span in _pieces(0, numel)):
        return job
    if all(bool((_read(donor, *span) == _read(one, *span)).all()) for one in others for span in _pieces(0, numel)):
        return replace(job, method=None, models=(donor,), base=None, statistics={})
    mended = without_shared_infinities_between(job, 0, numel)
    for span in _pieces(0, numel):  # a method may clip an infinity that is left, and its result would be finite
        check_sources(mended, *span)
    return mended


def without_shared_infinities_between(job: Job, start: int, stop: int) -> Job:
    """Return a job without the infinities that all models share among elements `start:stop`; the job itself if there are none."""
    donor, others = _sources(job)
    places: list[Tensor] = []
    values: list[Tensor] = []
    for first, last in _pieces(start, stop):
        own = _read(donor, first, last)
        shared = torch.isinf(own)
        for one in others:
            if bool(shared.any()):
                shared &= own == _read(one, first, last)
        found = shared.nonzero().view(-1)
        places.append(found + first)
        values.append(own[found])
    infinities = Infinities(torch.cat(places), torch.cat(values))
    if not len(infinities.places):
        return job
    return replace(
        job,
        models=tuple(_finite(one, infinities) for one in job.models),
        base=_finite(job.base, infinities) if job.base else None,
        infinities=infinities,
    )


def check_sources(job: Job, start: int, stop: int) -> None:
    """Check that elements `start:stop` of every model are finite.

    Raises:
        WeightsError: naming the model and the tensor that holds NaN or infinity.
    """
    for source in [*job.models, *([job.base] if job.base else [])]:
        bad = int((~torch.isfinite(_read(source, start, stop))).sum())
        if bad:
            raise WeightsError(
                f"{source.store.location}: tensor {source.key!r} holds non-finite values (NaN or infinity; {bad} between "
                f"elements {start} and {stop}). One such model would spoil the whole merge; leave it out or train it again."
            )


def _finite(source: Source, infinities: Infinities) -> Source:
    return Source(FiniteStore(source.store, source.key, infinities), source.key)


def _sources(job: Job) -> tuple[Source, Sequence[Source]]:
    sources = [*([job.base] if job.base else []), *job.models]
    return sources[0], sources[1:]


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + _PIECE, stop)) for first in range(start, stop, _PIECE))


def _read(source: Source, start: int, stop: int) -> Tensor:
    values = source.store.read_flat(source.key, start, stop)
    return values.float() if values.dtype.itemsize < 2 else values  # torch computes nothing on 8-bit floats


def _has_infinities(values: Tensor) -> bool:
    return not kernels.all_finite(values) and bool(torch.isinf(values).any())
