"""A plan: what a protocol trains, merges and scores, as a frozen graph in which every node is named by what decides it.

A node's fingerprint comes from its kind, operation, parameters and the fingerprints of its inputs. Its result is kept in a
pool under that name, whole or not at all, so a plan that is run again (after a crash, on another machine over the same pool,
with more rounds) does only what is missing. Protocols build plans and read results; they run nothing. Who runs a wave of
nodes is the caller's choice: `in_sequence` here, Hydra's launchers in `soups.launch.protocol`.

>>> base = Node("train", "pretrain", {"seed": 0})
>>> members = [Node("train", "fine_tune", {"seed": seed}, (base,)) for seed in range(2)]
>>> soup = Node("merge", "mean", {}, tuple(members))
>>> [len(wave) for wave in Plan((soup,)).waves(finished=())]
[1, 2, 1]
>>> [len(wave) for wave in Plan((soup,)).waves(finished={members[0].fingerprint, base.fingerprint})]
[1, 1]
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from soups.errors import ConfigError, SoupError, did_you_mean
from soups.stores.files import fingerprint
from soups.stores.pool import Failure, Ingredient, Pool
from soups.weights import Weights

Kind = Literal["train", "merge", "score"]

# Raise it when a change of this module changes what the same node gives.
PLAN_VERSION = 1


@dataclass(frozen=True, eq=False)
class Node:
    """One piece of work.

    Attributes:
        kind: train, merge or score. Merges are small and run where the plan is driven; the others are jobs.
        operation: which function does it.
        parameters: plain JSON values; everything that decides the result and is not in an input.
        inputs: nodes whose results it needs, in the order that the operation expects.
        name: shown to people; decides nothing.
        optional: nodes that need this one go on without it when it fails; decides nothing.
        determinants: what decides the result.
        fingerprint: SHA-256 (hex) of the determinants.
    """

    kind: Kind
    operation: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: tuple[Node, ...] = ()
    name: str = ""
    optional: bool = False

    determinants: dict[str, Any] = field(init=False, repr=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        # At once: a chain of rounds may be longer than Python's stack, and parameters may be changed by their owner.
        determinants = {
            "plan_version": PLAN_VERSION,
            "kind": self.kind,
            "operation": self.operation,
            "parameters": json.loads(json.dumps(dict(self.parameters))),
            "inputs": [node.fingerprint for node in self.inputs],
        }
        object.__setattr__(self, "determinants", determinants)
        object.__setattr__(self, "fingerprint", fingerprint(determinants))

    @property
    def label(self) -> str:
        """The name, or the operation where there is none."""
        return self.name or self.operation


@dataclass(frozen=True)
class Plan:
    """The nodes whose results are wanted; those they need come with them."""

    targets: tuple[Node, ...]

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """Every node by fingerprint, each after its inputs; equal nodes are one."""
        found: dict[str, Node] = {}
        stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(self.targets)]
        while stack:  # not by recursion: a chain of rounds may be longer than Python's stack
            node, inputs_done = stack.pop()
            if node.fingerprint in found:
                continue
            if inputs_done:
                found[node.fingerprint] = node
            else:
                stack += [(node, True), *((one, False) for one in reversed(node.inputs))]
        return found

    def waves(self, finished: Container[str]) -> list[list[Node]]:
        """Return what is still to be done, in waves: the nodes of one need only finished ones and those of earlier waves.

        A missing node that nothing unfinished needs is not done.
        """
        wanted = {node.fingerprint for node in self.targets if node.fingerprint not in finished}
        for name, node in reversed(self.nodes.items()):
            if name in wanted:
                wanted |= {one.fingerprint for one in node.inputs if one.fingerprint not in finished}
        depth: dict[str, int] = {}
        waves: list[list[Node]] = []
        for name, node in self.nodes.items():
            if name not in wanted:
                continue
            depth[name] = 1 + max((depth.get(one.fingerprint, -1) for one in node.inputs), default=-1)
            if depth[name] == len(waves):
                waves.append([])
            waves[depth[name]].append(node)
        return waves


@dataclass(frozen=True)
class Output:
    """A node's result.

    Attributes:
        tensors: weights, logits or nothing; finite.
        metrics: by split, then by name.
        notes: plain JSON values.
    """

    tensors: Weights = field(default_factory=dict[str, Tensor])
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, dict[str, float]])
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Work:
    """What an operation gets: its node, and the results of the node's inputs."""

    node: Node
    pool: Pool

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The node's parameters."""
        return self.node.determinants["parameters"]

    def record(self, number: int) -> Ingredient:
        """Return the record of an input: its metrics, notes, hash of tensors."""
        return self.pool.ingredient(self.node.inputs[number].fingerprint)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Read the tensors of an input, checked against its record."""
        return self.pool.weights(self.node.inputs[number].fingerprint)


Operation = Callable[[Work], Output]
# Runs the nodes of a wave, none of which needs another; returns why each one that failed did, as far as it knows.
RunWave = Callable[[Sequence[Node]], Mapping[str, str]]


def perform(node: Node, pool: Pool, operations: Mapping[str, Operation], *, keep: bool = True) -> None:
    """Do one node in this process and add its result to the pool; one that is there stays as it is.

    Args:
        node: its inputs must be in the pool.
        pool: where results are.
        operations: what can be done, by name.
        keep: false on the further ranks of a distributed run: they take part, one writes.

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
            record = Ingredient(
                fingerprint=node.fingerprint,
                determinants=node.determinants,
                metrics={split: dict(values) for split, values in output.metrics.items()},
                notes={**output.notes, "name": node.label},
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

    A failing node does not stop the others; errors that are not the user's to put right do.
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
    """Do what the pool lacks of a plan, wave by wave.

    Args:
        plan: what is wanted.
        pool: where results are and go.
        run: runs the nodes of one wave.
        on_wave: told the number of each wave before it starts, and all waves.

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
