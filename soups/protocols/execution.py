"""Running a plan: operations get their inputs from a pool, and their results go into it, whole or not at all.

Whoever calls `execute` chooses who runs a wave of nodes: `in_sequence` in this process, or Hydra's launchers in
`soups.launch.protocol`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from soups.errors import ConfigError, SoupError, did_you_mean
from soups.fitting.schema import Section
from soups.protocols.plan import Node, Parameters, Plan
from soups.stores.pool import Failure, Ingredient, Pool
from soups.weights import Weights


class Notes(Section):
    """Typed notes of a result: facts that later nodes or the report read."""


@dataclass(frozen=True)
class Output:
    """A node's result.

    Attributes:
        tensors: weights, logits or nothing; finite.
        metrics: by split, then by name.
        notes: `Notes`, or plain JSON values.
    """

    tensors: Weights = field(default_factory=dict[str, Tensor])
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, dict[str, float]])
    notes: Notes | Mapping[str, Any] = field(default_factory=dict[str, Any])


P = TypeVar("P", bound=Parameters)
N = TypeVar("N", bound=Notes)


def notes_of(record: Ingredient, kind: type[N]) -> N:
    """Return the typed notes of a node's record."""
    return kind.model_validate({key: value for key, value in record.notes.items() if key != "name"})


@dataclass(frozen=True)
class Work:
    """The arguments of an operation: its node, and the pool with the results of the node's inputs."""

    node: Node
    pool: Pool

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The node's parameters as JSON values."""
        return self.node.determinants["parameters"]

    def read(self, kind: type[P]) -> P:
        """Return the node's typed parameters."""
        assert isinstance(self.node.parameters, kind)
        return self.node.parameters

    def input(self, which: int | str) -> Node:
        """Return an input by its number, or the only input in a role."""
        if isinstance(which, int):
            return self.node.inputs[which]
        (node,) = self.node.inputs_of(which)
        return node

    def record(self, which: int | str) -> Ingredient:
        """Return the record of an input: its metrics, notes, hash of tensors."""
        return self.pool.ingredient(self.input(which).fingerprint)

    def records(self, role: str) -> list[Ingredient]:
        """Return the records of the inputs in a role."""
        return [self.pool.ingredient(node.fingerprint) for node in self.node.inputs_of(role)]

    def notes(self, which: int | str, kind: type[N]) -> N:
        """Return the typed notes of an input."""
        return notes_of(self.record(which), kind)

    def notes_of(self, node: Node, kind: type[N]) -> N:
        """Return the typed notes of one of several inputs in a role."""
        return notes_of(self.pool.ingredient(node.fingerprint), kind)

    def tensors(self, which: int | str) -> dict[str, Tensor]:
        """Read the tensors of an input, checked against its record."""
        return self.pool.weights(self.input(which).fingerprint)


Operation = Callable[[Work], Output]
# Runs the nodes of a wave, none of which needs another; returns why nodes failed, by fingerprint, as far as it knows.
RunWave = Callable[[Sequence[Node]], Mapping[str, str]]


def perform(node: Node, pool: Pool, operations: Mapping[str, Operation], *, keep: bool = True) -> None:
    """Do one node in this process and add its result to the pool; a result that is there stays as it is.

    Args:
        node: its inputs must be in the pool.
        pool: where results are.
        operations: by name.
        keep: write the result; false in the further ranks of a distributed run.

    Raises:
        ConfigError: there is no such operation.
        Exception: whatever the operation raises, after it was recorded in the pool.
    """
    if node.fingerprint in pool:
        return
    if node.operation not in operations:
        raise ConfigError(f"There is no operation {node.operation!r}: {did_you_mean(node.operation, operations)}")
    began = time.perf_counter()
    try:
        output = operations[node.operation](Work(node, pool))
        if keep:
            notes = output.notes.model_dump(mode="json") if isinstance(output.notes, Notes) else output.notes
            record = Ingredient(
                fingerprint=node.fingerprint,
                determinants=node.determinants,
                metrics={split: dict(values) for split, values in output.metrics.items()},
                notes={**notes, "name": node.label},
                durations={"total": time.perf_counter() - began},
            )
            pool.add(record, output.tensors)
    except Exception as error:
        if keep:
            why = str(error) if isinstance(error, SoupError) else f"{type(error).__name__}: {error}"
            pool.fail(Failure(fingerprint=node.fingerprint, error=why, determinants=node.determinants))
        raise


def in_sequence(pool: Pool, operations: Mapping[str, Operation]) -> RunWave:
    """Return a runner that does one node after another in this process.

    A node that fails with a `SoupError` does not stop the others; any other exception does.
    """

    def run(nodes: Sequence[Node]) -> dict[str, str]:
        errors: dict[str, str] = {}
        for node in nodes:
            try:
                with pool.lock(f"node-{node.fingerprint[:16]}"):
                    perform(node, pool, operations)
            except SoupError as error:
                errors[node.fingerprint] = str(error)
        return errors

    return run


def execute(
    plan: Plan,
    pool: Pool,
    run: RunWave,
    on_wave: Callable[[int, list[list[Node]]], None] = lambda number, waves: None,
) -> dict[str, str]:
    """Do the nodes of a plan that the pool lacks, wave by wave.

    Args:
        plan: the targets and everything they need.
        pool: where results are and go.
        run: runs the nodes of one wave.
        on_wave: called before each wave with its number and all waves.

    Returns:
        Why each missing node is missing, by fingerprint; empty when all targets are there.
    """
    pool.check_writable()
    missing: dict[str, str] = {}
    waves = plan.waves(pool)
    for number, wave in enumerate(waves):
        on_wave(number, waves)
        ready: list[Node] = []
        for node in wave:
            lost = next((one for one in node.inputs if one.fingerprint in missing and not one.optional), None)
            if lost is None:
                ready.append(node)
            else:
                missing[node.fingerprint] = f"({node.label}) it needs {lost.label}, which failed"
        known = run(ready) if ready else {}
        for node in ready:
            if node.fingerprint not in pool:
                failure = pool.failure(node.fingerprint)
                why = failure.error if failure else known.get(node.fingerprint, "it left no result")
                missing[node.fingerprint] = f"({node.label}) {why.strip()}"
    return missing
