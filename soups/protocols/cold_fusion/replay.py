"""Replaying the log: every round again from the contributions it accepted, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from soups.errors import SoupError, StorageError
from soups.protocols.cold_fusion.records import Contribution
from soups.protocols.cold_fusion.repository import Repository
from soups.weights import hash_weights


@dataclass(frozen=True)
class Replayed:
    """One round, again.

    Attributes:
        number: of the round.
        expected: hash of the base in the log.
        found: hash of the base that came out now.
        accepted: how many contributions went in.
    """

    number: int
    expected: str
    found: str
    accepted: int

    @property
    def same(self) -> bool:
        """Whether the bits are the same."""
        return self.expected == self.found


def replay(repository: Repository, number: int | None = None) -> Iterator[Replayed]:
    """Make a round (or all) again from the log and the stored contributions.

    Raises:
        StorageError: there is no such round; a contribution is counted by two rounds; a stored file is missing or altered.
    """
    rounds = repository.rounds()
    if number is not None and not 1 <= number <= len(rounds):
        raise StorageError(f"{repository.folder.url} has {len(rounds)} rounds, and no round {number}.")
    pushed = {record.id: record for record in repository.pushed()}
    seen: dict[str, int] = {}
    for record in rounds:
        for verdict in record.verdicts:
            if verdict.id in seen:
                raise StorageError(
                    f"The log of {repository.folder.url} counts contribution {verdict.id} in rounds {seen[verdict.id]} and "
                    f"{record.number}."
                )
            seen[verdict.id] = record.number
        if number not in (None, record.number):
            continue
        chosen: list[tuple[Contribution, float]] = []
        for verdict in record.accepted:
            contribution = pushed.get(verdict.id)
            if contribution is None:
                raise StorageError(f"The record of contribution {verdict.id} (round {record.number}) was removed.")
            chosen.append((contribution, verdict.scale))
        try:
            weights = repository.reduce(record.policy, record.base, chosen)
        except SoupError as error:
            raise StorageError(f"Round {record.number} cannot be made again: {error}") from error
        yield Replayed(record.number, record.result, hash_weights(weights), len(chosen))
