"""A plan: a frozen graph of the fits, merges and scores of a protocol, each node named by everything that decides it.

A node's fingerprint comes from its kind, operation, parameters and the fingerprints of its inputs. Its result is kept in a
pool under that name, whole or not at all. So a plan that is run again (after a crash, on another machine over the same pool,
with more rounds) does only the nodes that are missing. See `soups.protocols.execution` for running one.

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
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel

from soups.fitting.schema import Section
from soups.fitting.spec import FitSpec
from soups.stores.files import fingerprint

Kind = Literal["train", "merge", "score"]

# Raise it when a change of this module or of the protocols' parameters changes the result or the name of the same node.
PLAN_VERSION = 2


class Parameters(Section):
    """Typed parameters of an operation: everything that decides its result and is not in an input."""

    def determinants(self) -> dict[str, Any]:
        """Return what enters the node's fingerprint: every field; a `FitSpec` as what decides that fit."""
        return {name: _determined(getattr(self, name)) for name in type(self).model_fields}


def _determined(value: Any) -> Any:
    if isinstance(value, FitSpec):
        return value.determinants()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _determined(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_determined(part) for part in value]
    return value


# Nodes in the order that the operation expects, or by role; a role may have several nodes.
Inputs = Sequence["Node"] | Mapping[str, "Node | Sequence[Node]"]


@dataclass(frozen=True, eq=False)
class Node:
    """One piece of work.

    Attributes:
        kind: train, merge or score. Merges are small and run where the plan is driven; the others are jobs.
        operation: name of the function that does it.
        parameters: `Parameters`, or plain JSON values.
        given: nodes whose results it needs.
        name: shown to people; decides nothing.
        optional: nodes that need this one go on without it when it fails; decides nothing.
        determinants: everything that decides the result, as JSON values.
        fingerprint: SHA-256 (hex) of the determinants.
    """

    kind: Kind
    operation: str
    parameters: Parameters | Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: Inputs = ()
    name: str = ""
    optional: bool = False

    determinants: dict[str, Any] = field(init=False, repr=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        # At once: a chain of rounds may be longer than Python's stack, and parameters may be changed by their owner.
        parameters = self.parameters
        values = parameters.determinants() if isinstance(parameters, Parameters) else dict(parameters)
        inputs: Any = [node.fingerprint for node in self.inputs]
        if isinstance(self.given, Mapping):
            inputs = {
                role: nodes.fingerprint if isinstance(nodes, Node) else [node.fingerprint for node in nodes]
                for role, nodes in self.given.items()
            }
        determinants = {
            "plan_version": PLAN_VERSION,
            "kind": self.kind,
            "operation": self.operation,
            "parameters": json.loads(json.dumps(values)),
            "inputs": inputs,
        }
        object.__setattr__(self, "determinants", determinants)
        object.__setattr__(self, "fingerprint", fingerprint(determinants))

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose results it needs, in their order."""
        if not isinstance(self.given, Mapping):
            return tuple(self.given)
        return tuple(node for role in self.given for node in self.inputs_of(role))

    def inputs_of(self, role: str) -> tuple[Node, ...]:
        """Return the inputs in a role; none where the node has no such role."""
        assert isinstance(self.given, Mapping)
        nodes = self.given.get(role, ())
        return (nodes,) if isinstance(nodes, Node) else tuple(nodes)

    def input(self, role: str) -> Node:
        """Return the only input in a role."""
        (node,) = self.inputs_of(role)
        return node

    @property
    def label(self) -> str:
        """The name, or the operation where there is none."""
        return self.name or self.operation


@dataclass(frozen=True)
class Plan:
    """The nodes whose results are wanted; the nodes that they need come with them."""

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
        """Return the missing nodes in waves: the nodes of a wave need only finished nodes and those of earlier waves.

        A missing node that nothing unfinished needs is left out.
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
