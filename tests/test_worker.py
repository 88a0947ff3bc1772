"""Functions called in processes of their own: what arrives there, who does it, and how it fails."""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import Field, ValidationError

from soups import worker
from soups.errors import RunError, WeightsError
from soups.worker import Message, run_in_processes


class Note(Message):
    """What the functions below get."""

    path: Path
    number: float = 0.0
    nested: dict[str, list[int]] = Field(default_factory=dict)


def write(note: Note) -> None:
    with note.path.open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {note.number} {note.nested}\n")


def refuse(note: Note) -> None:
    raise WeightsError(f"{note.path.name} does not fit")


def die(note: Note) -> None:
    os._exit(7)


def hang(note: Note) -> None:
    note.path.touch()
    signal.pause()


class Holder:
    @staticmethod
    def write(note: Note) -> None:
        write(note)


def rows(path: Path) -> list[list[str]]:
    return [line.split(maxsplit=3) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    for group in worker._Group._kept.values():
        group.close()
    worker._Group._kept.clear()


def test_the_message_arrives_whole_in_another_process(tmp_path: Path) -> None:
    before = set(worker._Group._kept)  # other tests of this process may have left some for theirs
    run_in_processes(write, Note(path=tmp_path / "out", number=math.inf, nested={"a": [1, 2]}))
    run_in_processes(Holder.write, Note(path=tmp_path / "out", number=0.1))
    (first, second) = rows(tmp_path / "out")
    assert first[2:] == ["inf", "{'a': [1, 2]}"] and second[2:] == ["0.1", "{}"]
    assert os.getpid() not in (int(first[0]), int(second[0])) and first[0] != second[0]
    assert not set(worker._Group._kept) - before, "processes that nobody reuses are gone"
    with pytest.raises(ProcessLookupError):
        os.kill(int(second[0]), 0)


def test_calls_of_one_kind_share_processes_until_one_fails_or_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(kind: str = "two devices") -> int:
        run_in_processes(write, Note(path=tmp_path / "out"), reuse=kind)
        return int(rows(tmp_path / "out")[-1][0])

    first = process()
    assert process() == first
    with pytest.raises(RunError, match=r"^absent does not fit$"):
        run_in_processes(refuse, Note(path=Path("absent")), reuse="two devices")
    second = process()
    assert second != first
    with pytest.raises(RunError, match="ended with code 7"):
        run_in_processes(die, Note(path=tmp_path), reuse="two devices")
    third = process()
    assert third not in (first, second)
    os.kill(third, signal.SIGKILL)
    next(iter(worker._Group._kept.values()))._process.wait()
    fourth = process()
    assert fourth != third and process() == fourth
    other = process("one device")
    assert other != fourth, "another kind"
    monkeypatch.setenv("SOUPS_TEST_OF_WORKERS", "1")
    assert process("one device") != other, "another environment"
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_an_interruption_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(hang, Note(path=tmp_path / "out"), reuse="any")
    (group,) = worker._Group._kept.values()
    assert group._process.poll() == -signal.SIGKILL


def test_what_cannot_be_sent_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be imported by another process"):
        run_in_processes(lambda note: None, Note(path=tmp_path))
    with pytest.raises(ValidationError, match="nubmer"):
        Note(path=tmp_path, nubmer=1)  # pyright: ignore[reportCallIssue]
