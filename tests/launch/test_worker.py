"""Processes that do jobs one after another."""

import copy
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from soups.launch import worker
from soups.launch.settings import RunError, Settings
from soups.launch.worker import run_in_processes
from soups.stores.pool import Pool

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ended() -> None:
    yield
    for group in worker._Group._kept.values():
        group.close()
    worker._Group._kept.clear()


def the_process() -> int:
    (group,) = worker._Group._kept.values()
    return group._process.pid


def test_jobs_share_processes_until_one_fails_or_dies(settings: Settings, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    run_in_processes("fit", settings, False)
    first = the_process()
    run_in_processes("fit", {**settings, "seed": 1}, False)
    assert the_process() == first
    assert len(Pool(pool).ingredients()) == 2

    unreadable = copy.deepcopy(settings)
    unreadable["data"]["root"] = str(tmp_path / "absent")
    with pytest.raises(RunError, match="absent"):
        run_in_processes("fit", unreadable, False)
    run_in_processes("fit", {**settings, "seed": 2}, False)
    second = the_process()
    assert second != first
    assert len(Pool(pool).ingredients()) == 3

    os.kill(second, signal.SIGKILL)
    next(iter(worker._Group._kept.values()))._process.wait()
    run_in_processes("fit", {**settings, "seed": 3}, False)
    assert the_process() != second
    assert len(Pool(pool).ingredients()) == 4


def test_other_devices_or_another_environment_are_other_processes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_processes("fit", settings, False)
    first = the_process()
    monkeypatch.setenv("SOUPS_TEST_OF_WORKERS", "1")
    run_in_processes("fit", {**settings, "seed": 1}, False)
    assert the_process() != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_job_alone_leaves_no_process(settings: Settings, tmp_path: Path) -> None:
    run_in_processes("fit", settings, False, alone=True)
    assert not worker._Group._kept
    assert len(Pool(tmp_path / "pool").ingredients()) == 1


def test_an_interruption_ends_the_job(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_in_processes("fit", settings, False)
    (group,) = worker._Group._kept.values()
    assert group._process.poll() == -signal.SIGKILL
