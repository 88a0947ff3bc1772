"""The repository: a folder (or fsspec URL) that holds the current base and a log that only grows. There is no server.

::

    repository.json          what it is of, and its rules; created once
    objects/<hash>.safetensors   weights by their hash: bases and contributions
    pushed/<id>.json         one record a contribution, written after its weights
    rounds/000001.json …     one record a round, created exclusively: the log

The current base is the result of the last round. Whoever likes fuses: reads the log, takes every contribution that no round
has used up, screens them, fuses them in the order of their ids, stores the result, and creates the next round's record. Of
two fusers one creates it; the other's work is dropped. A process that dies leaves either a whole record or none, so nothing
is lost, nothing is counted twice, and nobody waits for a dead one: there is no lock.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from soups.errors import SoupError, StorageError, WeightsError
from soups.merging import make_method
from soups.protocols.cold_fusion.objects import Weighable, dump_record, put_weights, tokenizer_of
from soups.protocols.cold_fusion.records import Contribution, Manifest, Policy, Round
from soups.protocols.cold_fusion.reduction import AcceptedUpdate, fuse_updates
from soups.protocols.cold_fusion.screening import PendingUpdate, accepted_norms, misfit, screen
from soups.stores.files import fingerprint
from soups.stores.opening import open_store
from soups.stores.safetensors import DTYPE_NAMES, SafetensorsStore
from soups.stores.shared import SharedFolder
from soups.stores.store import Store
from soups.weights import Weights, check_finite, hash_weights, is_averaged, tied_names

MANIFEST = "repository.json"

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Base:
    """A base: its number (0 is the one the repository was made with) and its hash."""

    number: int
    hash: str


class Repository:
    """A repository that is there.

    Args:
        url: a folder or an fsspec URL (`s3://bucket/model`).

    Raises:
        StorageError: there is none, or its manifest is damaged.
    """

    def __init__(self, url: str | Path) -> None:
        self.folder = SharedFolder(url, "repository")
        try:
            self.manifest = self._parse(Manifest, MANIFEST)
        except FileNotFoundError:
            raise StorageError(
                f"There is no repository at {self.folder.url}. Make one: soups cold init {self.folder.url} BASE."
            ) from None

    @staticmethod
    def create(
        url: str | Path,
        base: Weighable,
        policy: Policy | None = None,
        *,
        frozen: Iterable[str] = (),
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> Repository:
        """Make a repository, or open the one that was made with the same base and rules.

        Args:
            url: where.
            base: the model that everybody starts from, without a head.
            policy: how to screen and fuse.
            frozen: patterns of tensor names that nobody trains (embeddings, say): stored once and not pushed. Integer and
                bool tensors are always among them.
            tokenizer: folder with the tokenizer that goes with the weights; the base's folder when that has one.

        Raises:
            ConfigError: the policy's merge method does not exist.
            StorageError: another repository is there, or the place cannot be written.
            WeightsError: the base holds NaN or infinity, or everything is frozen.
        """
        policy = policy or Policy()
        make_method(policy.method, **policy.parameters)
        place = SharedFolder(url, "repository")
        with open_store(base) as store:
            weights, where = store.load(), store.location
        check_finite(weights, where=where)
        patterns = tuple(frozen)
        fixed = {
            name: tensor
            for name, tensor in weights.items()
            if not is_averaged(tensor) or any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        shared = {name: tensor for name, tensor in weights.items() if name not in fixed}
        if not shared:
            raise WeightsError(f"{where}: no tensor is left to share; frozen={list(patterns)} takes them all.")
        manifest = Manifest(
            base=put_weights(place, shared)[0],
            frozen=put_weights(place, fixed)[0] if fixed else None,
            tensors={name: (DTYPE_NAMES[t.dtype], list(t.shape)) for name, t in sorted(shared.items())},
            tokenizer=tokenizer_of(tokenizer if tokenizer is not None else base),
            policy=policy,
        )
        if not place.create(MANIFEST, dump_record(manifest)):
            there = Repository(url)
            wanted, found = (m.model_dump(exclude={"created"}) for m in (manifest, there.manifest))
            if differs := [key for key, value in wanted.items() if found[key] != value]:
                raise StorageError(
                    f"{place.url} holds another repository: its {', '.join(differs)} differ. Use another place for this one."
                )
        return Repository(url)

    # What is there

    def rounds(self) -> list[Round]:
        """Return the log: the records of all rounds, first to last.

        Raises:
            StorageError: a record is damaged or one is missing.
        """
        rounds = [self._parse(Round, f"rounds/{name}") for name in self.folder.names("rounds")]
        previous = self.manifest.base
        for number, record in enumerate(rounds, 1):
            if record.number != number or record.base != previous:
                raise StorageError(
                    f"The log of {self.folder.url} is not whole at round {number}: rounds/{number:06d}.json was removed or "
                    f"changed. Restore it from a copy."
                )
            previous = record.result
        return rounds

    def bases(self) -> list[Base]:
        """Return all bases so far, base 0 first."""
        return [Base(0, self.manifest.base), *(Base(record.number, record.result) for record in self.rounds())]

    def current(self) -> Base:
        """Return the current base."""
        return self.bases()[-1]

    def pushed(self) -> list[Contribution]:
        """Return all contributions, in the order of their ids."""
        return [self._parse(Contribution, f"pushed/{name}") for name in self.folder.names("pushed")]

    def pending(self) -> list[Contribution]:
        """Return the contributions that no round has used up, in the order of their ids."""
        # The pushes first: one that arrives between the two readings then waits for the next round.
        pushed = self.pushed()
        used = {verdict.id for record in self.rounds() for verdict in record.verdicts}
        return [record for record in pushed if record.id not in used]

    # What contributors do

    def pull(self, number: int | None = None) -> tuple[Base, dict[str, Tensor]]:
        """Return a base (the current one) and its weights, the frozen part included.

        Raises:
            StorageError: there is no such base, or its file is damaged.
        """
        bases = self.bases()
        if number is not None and not 0 <= number < len(bases):
            raise StorageError(f"{self.folder.url} has bases 0 to {len(bases) - 1}, and no base {number}.")
        base = bases[-1 if number is None else number]
        weights = self._load(base.hash)
        if self.manifest.frozen:
            weights |= self._load(self.manifest.frozen)
        return base, weights

    def push(
        self,
        weights: Weighable,
        base: Base | int | str,
        contributor: str,
        note: Mapping[str, Any] | None = None,
        *,
        prefix: str | None = None,
        state: str | None = None,
    ) -> Contribution:
        """Push the shared part of some weights; the same push twice is one contribution.

        The weights are uploaded under their hash, then a small record is written; a push that is cut off before that leaves
        nothing that anybody looks at.

        Args:
            weights: whatever `open_store` takes. Tensors that the repository does not have (a head) are left out.
            base: the base that fine-tuning started from, or its number or hash.
            contributor: a name.
            note: anything worth keeping in the log.
            prefix, state: as `open_store` takes them: `prefix="model."` for a LightningModule's checkpoint.

        Raises:
            WeightsError: the weights do not fit the repository, are not finite, or change frozen tensors.
            StorageError: the base was never here, the tokenizer is another one, or the place cannot be written.
        """
        start = self._base(base)
        with open_store(weights, state=state, prefix=prefix) as store:
            where = store.location
            if problem := misfit(self.manifest, store):
                raise WeightsError(
                    f"{where} does not fit the repository {self.folder.url}: {problem}. Contributors share architecture, "
                    f"vocabulary and dtype; names under a prefix need prefix=…, such as 'model.' or 'bert.'."
                )
            self._check_frozen(store)
            shared = self._as_tied({name: store.read(name) for name in self.manifest.tensors})
        found = tokenizer_of(weights)
        if found and self.manifest.tokenizer and found != self.manifest.tokenizer:
            raise WeightsError(
                f"{where} comes with another tokenizer than the repository's: its token ids mean other tokens. Fine-tune the "
                f"pulled base with the repository's tokenizer."
            )
        check_finite(shared, where=where)
        name, nbytes = put_weights(self.folder, shared)
        determined = {"contributor": contributor, "base": start.hash, "weights": name}
        record = Contribution(id=fingerprint(determined)[:32], nbytes=nbytes, note=dict(note or {}), **determined)
        path = f"pushed/{record.id}.json"
        if not self.folder.create(path, dump_record(record)):
            return self._parse(Contribution, path)
        return record

    # What fusers do

    def fuse(
        self,
        *,
        only: Sequence[str] | None = None,
        score: Callable[[Weights], float] | None = None,
        fuser: str | None = None,
    ) -> Round | None:
        """Make the next round from the pending contributions.

        Args:
            only: ids to consider; all pending ones when None.
            score: held-out score of some weights (the whole model without a head), for the held-out check; larger is better.
            fuser: who fuses, for the log.

        Returns:
            The round; None when fewer contributions than the policy's quorum pass, or when another fuser was first.

        Raises:
            StorageError: the place cannot be read or written.
        """
        rounds = self.rounds()
        numbers = {self.manifest.base: 0} | {record.result: record.number for record in rounds}
        current = Base(len(rounds), rounds[-1].result if rounds else self.manifest.base)
        chosen = [record for record in self.pending() if only is None or record.id in only]
        policy = self.manifest.policy
        if len(chosen) < policy.quorum:
            return None
        known = accepted_norms(rounds[-1].verdicts) if rounds else []
        base_score = score(self.pull(current.number)[1]) if score else None
        with ExitStack() as stack:
            candidates = [self._candidate(record, numbers, stack, score) for record in chosen]
            verdicts = screen(self.manifest, policy, candidates, current.number, known, base_score)
        accepted = [verdict for verdict in verdicts if verdict.accepted]
        if len(accepted) < policy.quorum:
            return None
        weights = self.reduce(policy, current.hash, [(self._contribution(v.id), v.scale) for v in accepted])
        record = Round(
            number=current.number + 1,
            base=current.hash,
            result=put_weights(self.folder, weights)[0],
            policy=policy,
            verdicts=verdicts,
            fuser=fuser or f"{platform.node()}:{os.getpid()}",
        )
        return record if self.folder.create(f"rounds/{record.number:06d}.json", dump_record(record)) else None

    def reduce(self, policy: Policy, current: str, accepted: Sequence[tuple[Contribution, float]]) -> dict[str, Tensor]:
        """Return the new base's shared part from accepted contributions, each with its factor, in the order of their ids."""
        parts = [
            AcceptedUpdate(
                lambda record=record: self._open(record.weights, record.nbytes),
                lambda record=record: self._open(record.base),
                scale,
                fresh=record.base == current,
            )
            for record, scale in sorted(accepted, key=lambda pair: pair[0].id)
        ]
        with self._open(current) as base:
            return fuse_updates(policy, base, parts)

    # Parts

    def _as_tied(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights that share tensors where base 0 does and the values are equal, so that equal weights are one file."""
        with self._open(self.manifest.base) as base:
            ties = base.tied()
        kept = {name: first for name, first in ties.items() if torch.equal(weights[name], weights[first])}
        own = {name: weights[name].clone() for name in tied_names(weights) if name not in kept}
        return {**weights, **own, **{name: weights[first] for name, first in kept.items()}}

    def _base(self, base: Base | int | str) -> Base:
        bases = self.bases()
        for known in bases:
            if base == known or base == known.number or base == known.hash:
                return known
        raise StorageError(
            f"{self.folder.url} never had the base {base!r}; it has 0 to {len(bases) - 1}. Pull one, fine-tune that one, and "
            f"name it in the push."
        )

    def _check_frozen(self, store: Store) -> None:
        if not self.manifest.frozen:
            return
        names = set(store.keys())
        with self._open(self.manifest.frozen) as frozen:
            for name in frozen:
                if name in names and is_averaged(frozen.read_flat(name, 0, 1)):
                    same = store.meta(name).shape == frozen.meta(name).shape
                    if not same or not torch.equal(store.read(name), frozen.read(name)):
                        raise WeightsError(
                            f"{store.location}: {name!r} is frozen in {self.folder.url}, but differs here"
                            f"{'' if same else ' in shape (another vocabulary?)'}. Freeze it in fine-tuning too."
                        )

    def _candidate(
        self,
        record: Contribution,
        numbers: Mapping[str, int],
        stack: ExitStack,
        score: Callable[[Weights], float] | None,
    ) -> PendingUpdate:
        start = stack.enter_context(self._open(record.base)) if record.base in numbers else None
        try:
            weights: Store | SoupError = stack.enter_context(self._open(record.weights, record.nbytes))
            loaded = weights.load()
            if hash_weights(loaded) != record.weights:
                weights = StorageError("its file was altered or cut off")
        except SoupError as error:
            weights, loaded = error, {}
        value = None
        if score and isinstance(weights, Store) and start is not None and not misfit(self.manifest, weights):
            frozen = self._load(self.manifest.frozen) if self.manifest.frozen else {}
            value = score(loaded | frozen)
        return PendingUpdate(record, weights, start, numbers.get(record.base), value)

    def _contribution(self, name: str) -> Contribution:
        return self._parse(Contribution, f"pushed/{name}.json")

    def _open(self, name: str, nbytes: int | None = None) -> Store:
        path = f"objects/{name}.safetensors"
        if nbytes is not None and (size := self.folder.size(path)) != nbytes:
            raise StorageError(f"{self.folder.path(path)} has {size} bytes; {nbytes} were pushed.")
        return SafetensorsStore(self.folder.path(path))

    def _load(self, name: str) -> dict[str, Tensor]:
        with self._open(name) as store:
            weights = store.load()
        if hash_weights(weights) != name:
            raise StorageError(
                f"{self.folder.path(f'objects/{name}.safetensors')} was altered after it was written. Restore it from a copy, "
                f"or remove it and replay the round that made it."
            )
        return weights

    def _parse(self, model: type[Model], name: str) -> Model:
        content = self.folder.read(name)
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise StorageError(
                f"{self.folder.path(name)} is not a whole record ({error.error_count()} faults, the first: "
                f"{error.errors()[0]['msg']}). Records are written once; this one was changed by another program."
            ) from error
