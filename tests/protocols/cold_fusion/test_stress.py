"""Eight processes, 200 contributions, kill -9 at random, cut-off and poisoned pushes: nothing lost, nothing counted twice.

Contribution k adds 1 to element k alone. So element k of the final base is 1/n, n being the number of contributions in the
round that took it: a contribution that was lost leaves 0 there, one that was counted twice too much.
"""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from soups.protocols.cold_fusion import Policy, Repository, replay
from soups.protocols.cold_fusion.objects import dump_record, put_weights
from soups.protocols.cold_fusion.records import Contribution
from soups.stores.shared import SharedFolder

WORKERS, EACH = 8, 25
TOTAL = WORKERS * EACH


def contribute(place: Path, worker: int) -> None:
    """Push what this worker has not pushed yet, and fuse now and then; a restarted one looks into the log."""
    torch.set_num_threads(1)
    repository = Repository(place)
    name = f"worker {worker}"
    done = {record.note["index"] for record in repository.pushed() if record.contributor == name}
    source = random.Random(worker)
    for index in range(worker * EACH, (worker + 1) * EACH):
        if index in done:
            continue
        base, weights = repository.pull()
        time.sleep(0.01 * source.random())  # training: others fuse meanwhile, and the contribution gets stale
        weights["w"][index] += 1
        repository.push(weights, base, name, {"index": index})
        if source.random() < 0.3:
            repository.fuse(fuser=name)
    while repository.fuse(fuser=name):
        pass


def poison(place: Path, number: int) -> None:
    """Push NaN, or a file that is cut off under its final name, without our checks."""
    files, base = SharedFolder(str(place)), Repository(place).current()
    values = torch.full((TOTAL,), float("nan")) if number % 2 else torch.full((TOTAL,), float(number + 2))
    weights, nbytes = put_weights(files, {"w": values})
    if number % 2 == 0:
        path = Path(files.path(f"objects/{weights}.safetensors"))
        path.write_bytes(path.read_bytes()[: 50 + number])
    record = Contribution(
        id=f"{number:032x}", contributor="attacker", base=base.hash, weights=weights, nbytes=nbytes, note={"index": -1}
    )
    assert files.create(f"pushed/{record.id}.json", dump_record(record))


def start(context, place: Path, worker: int) -> BaseProcess:
    process = context.Process(target=contribute, args=(place, worker))
    process.start()
    return process


@pytest.mark.slow
def test_two_hundred_contributions_from_eight_processes_with_faults(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    Repository.create(place, {"w": torch.zeros(TOTAL)}, Policy(quorum=3))
    context, source = multiprocessing.get_context("fork"), random.Random(0)
    running = {worker: start(context, place, worker) for worker in range(WORKERS)}
    kills, poisons, deadline = 0, 0, time.monotonic() + 300
    while running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        progress = len(list((place / "pushed").glob("*.json")))  # faults come with it, however fast the machine is
        for worker, process in list(running.items()):
            if not process.is_alive():
                process.join()
                assert process.exitcode in (0, -signal.SIGKILL), "no worker fails by itself"
                del running[worker]
                if process.exitcode:
                    running[worker] = start(context, place, worker)
        if running and progress >= 8 * (kills + 1):
            victim = running[source.choice(sorted(running))]
            if victim.pid is not None and victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
        if progress >= 20 * (poisons + 1):
            poison(place, poisons)
            poisons += 1
    assert kills >= 15 and poisons >= 6

    repository = Repository(place)
    while repository.fuse(fuser="the test"):
        pass
    pushed, rounds = repository.pushed(), repository.rounds()
    indices = [record.note["index"] for record in pushed if record.contributor != "attacker"]
    assert sorted(indices) == list(range(TOTAL)), "every contribution is there once"
    verdicts = [verdict for record in rounds for verdict in record.verdicts]
    assert len({verdict.id for verdict in verdicts}) == len(verdicts), "none is in two rounds"
    assert all(verdict.contributor == "attacker" for verdict in verdicts if not verdict.accepted)
    assert not any(verdict.accepted for verdict in verdicts if verdict.contributor == "attacker")
    waiting = [record for record in repository.pending() if record.contributor != "attacker"]
    assert len(waiting) < 3, "fewer than the quorum are left"

    index_of = {record.id: record.note["index"] for record in pushed}
    expected = torch.zeros(TOTAL)
    for record in rounds:
        for verdict in record.accepted:
            expected[index_of[verdict.id]] = 1 / len(record.accepted)
    torch.testing.assert_close(repository.pull()[1]["w"], expected, rtol=0, atol=1e-6)
    assert int((expected == 0).sum()) == len(waiting)
    assert any(verdict.started < record.number - 1 for record in rounds for verdict in record.accepted), (
        "some were stale"
    )

    replayed = list(replay(repository))
    assert len(replayed) == len(rounds) > 20 and all(result.same for result in replayed)
