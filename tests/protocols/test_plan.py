"""Plans: names, waves, resuming after faults, and results that are whole or absent."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError, WeightsError
from soups.protocols import Node, Output, Plan, Work, execute, in_sequence, perform
from soups.stores.pool import Pool


def constant(work: Work) -> Output:
    return Output({"w": torch.full((2,), float(work.parameters["value"]))}, {"heldout": {"loss": 0.5}}, {"seen": True})


def mean(work: Work) -> Output:
    tensors = [work.tensors(number)["w"] for number in range(len(work.node.inputs))]
    return Output({"w": torch.stack(tensors).mean(0)})


OPERATIONS = {"constant": constant, "mean": mean}


def diamond(*values: float) -> Plan:
    members = tuple(Node("train", "constant", {"value": value}, name=f"member {value}") for value in values)
    return Plan((Node("merge", "mean", {}, members),))


def test_a_name_depends_on_everything_that_decides_and_on_nothing_else() -> None:
    base = Node("train", "constant", {"value": 1})
    assert base.fingerprint == Node("train", "constant", {"value": 1}, name="another").fingerprint
    others = [
        Node("score", "constant", {"value": 1}),
        Node("train", "mean", {"value": 1}),
        Node("train", "constant", {"value": 2}),
        Node("train", "constant", {"value": 1}, (base,)),
        Node("train", "constant", {"value": 1}, (base, base)),
    ]
    assert len({node.fingerprint for node in [base, *others]}) == 6
    one, two = Node("train", "constant", {"value": 1}), Node("train", "constant", {"value": 2})
    assert Node("merge", "mean", {}, (one, two)).fingerprint != Node("merge", "mean", {}, (two, one)).fingerprint


def test_results_are_kept_and_found(tmp_path: Path) -> None:
    pool, plan = Pool(tmp_path), diamond(1, 3)
    assert execute(plan, pool, in_sequence(pool, OPERATIONS)) == {}
    (target,) = plan.targets
    assert torch.equal(pool.weights(target.fingerprint, verify=True)["w"], torch.tensor([2.0, 2.0]))
    member = pool.ingredient(target.inputs[0].fingerprint)
    assert member.metrics == {"heldout": {"loss": 0.5}} and member.notes == {"seen": True, "name": "member 1"}
    assert member.determinants["parameters"] == {"value": 1}

    def never(nodes):
        raise AssertionError([node.label for node in nodes])

    assert execute(plan, pool, never) == {}
    # One more member: only that one and the merge are new.
    ran: list[str] = []
    run = in_sequence(pool, OPERATIONS)
    assert execute(diamond(1, 3, 8), pool, lambda nodes: [ran.extend(n.label for n in nodes), run(nodes)][1]) == {}
    assert ran == ["member 8", "mean"]


def test_an_input_that_nothing_needs_any_more_is_not_made_again(tmp_path: Path) -> None:
    pool, plan = Pool(tmp_path), diamond(1, 3)
    execute(plan, pool, in_sequence(pool, OPERATIONS))
    lost = plan.targets[0].inputs[0].fingerprint
    (tmp_path / "ingredients" / lost).rename(tmp_path / "away")
    assert plan.waves(pool) == []
    more = Plan((*plan.targets, Node("score", "mean", {}, plan.targets[0].inputs)))
    assert [[node.label for node in wave] for wave in more.waves(pool)] == [["member 1"], ["mean"]]


def test_a_failure_is_recorded_stops_only_its_heirs_and_is_forgotten_when_it_succeeds(tmp_path: Path) -> None:
    pool, plan = Pool(tmp_path), Plan((*diamond(1, 2).targets, *diamond(5, 6).targets))
    broken = {"value": True}

    def sometimes(work: Work) -> Output:
        if work.parameters["value"] == 2 and broken["value"]:
            raise WeightsError("it diverged")
        return constant(work)

    run = in_sequence(pool, {**OPERATIONS, "constant": sometimes})
    missing = execute(plan, pool, run)
    assert sorted(missing.values()) == ["(mean) it needs member 2, which failed", "(member 2) it diverged"]
    assert plan.targets[1].fingerprint in pool and plan.targets[0].fingerprint not in pool
    failed = plan.targets[0].inputs[1].fingerprint
    failure = pool.failure(failed)
    assert failure is not None and failure.error == "it diverged"
    broken["value"] = False
    assert execute(plan, pool, run) == {} and pool.failure(failed) is None


def test_heirs_of_an_optional_node_do_without_it(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    contributor = Node("train", "dies", {}, name="contributor", optional=True)
    target = Node("merge", "constant", {"value": 1}, (contributor,))

    def dies(work: Work) -> Output:
        raise WeightsError("killed")

    missing = execute(Plan((target,)), pool, in_sequence(pool, {**OPERATIONS, "dies": dies}))
    assert missing == {contributor.fingerprint: "(contributor) killed"} and target.fingerprint in pool
    assert Plan((target,)).waves(pool) == [], "nothing needs it any more"


def test_results_that_are_not_finite_and_operations_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    node = Node("train", "constant", {"value": float("inf")})
    with pytest.raises(WeightsError, match="non-finite"):
        perform(node, pool, OPERATIONS)
    assert node.fingerprint not in pool
    with pytest.raises(ConfigError, match="did you mean 'constant'"):
        perform(Node("train", "constnt", {}), pool, OPERATIONS)
    # Further ranks take part and write nothing.
    perform(Node("train", "constant", {"value": 1}), pool, OPERATIONS, keep=False)
    assert pool.ingredients() == []


def test_a_long_chain_needs_no_deep_stack(tmp_path: Path) -> None:
    node = Node("train", "constant", {"value": 0})
    for number in range(3000):
        node = Node("merge", "mean", {"round": number}, (node,))
    assert len(Plan((node,)).waves(finished=())) == 3001


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=14), st.sets(st.integers(0, 13)))
def test_waves_hold_each_missing_node_once_after_what_it_needs(edges: list[list[int]], kept: set[int]) -> None:
    nodes: list[Node] = []
    for number, wanted in enumerate(edges):
        inputs = tuple(nodes[other % len(nodes)] for other in wanted) if nodes else ()
        nodes.append(Node("train", "constant", {"number": number}, inputs))
    finished = {nodes[number].fingerprint for number in kept if number < len(nodes)}
    done = set(finished)
    for wave in Plan(tuple(nodes)).waves(finished):
        assert wave
        assert all(one.fingerprint in done for node in wave for one in node.inputs)
        names = {node.fingerprint for node in wave}
        assert len(names) == len(wave) and not names & done
        done |= names
    assert done == {node.fingerprint for node in nodes}


def slow_constant(work: Work) -> Output:
    time.sleep(0.02)
    return constant(work)


def rounds() -> Plan:
    last: tuple[Node, ...] = ()
    for number in range(4):
        members = tuple(Node("train", "constant", {"value": i, "round": number}, last) for i in range(5))
        last = (Node("merge", "mean", {}, members),)
    return Plan(last)


def run_rounds(place: Path) -> None:
    torch.set_num_threads(1)
    pool = Pool(place)
    assert execute(rounds(), pool, in_sequence(pool, {"constant": slow_constant, "mean": mean})) == {}


def test_kill_at_any_moment_then_the_same_plan_ends_in_the_same_bits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    kept: dict[str, int] = {}
    for finished in (0, 3, 9):
        process = context.Process(target=run_rounds, args=(tmp_path / "pool",))
        process.start()
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "pool" / "ingredients").glob("[!.]*"))) < len(kept) + finished:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pool" / "ingredients").glob("[!.]*")}
        assert all(now[name] == when for name, when in kept.items()), "finished nodes are not redone"
        kept = now
    assert 12 <= len(kept) < 24
    run_rounds(tmp_path / "pool")
    run_rounds(tmp_path / "fresh")
    (last,) = rounds().targets
    assert (
        Pool(tmp_path / "pool").ingredient(last.fingerprint).weights
        == Pool(tmp_path / "fresh").ingredient(last.fingerprint).weights
    )
