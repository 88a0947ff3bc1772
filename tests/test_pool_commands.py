"""`soups pool …`: what it shows, what it refuses, and that it never damages a pool."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from soups.cli import app
from soups.stores.files import write_json
from soups.stores.garbage import leftovers, needed_by, remove
from soups.stores.pool import Pool
from soups.stores.records import Failure, Ingredient

NAMES = {"a1" + "0" * 62: (0.9, 1e-4), "a2" + "0" * 62: (0.95, 3e-4), "b1" + "0" * 62: (0.8, 1e-4)}
FIRST, SECOND, THIRD = NAMES
LONG_AGO = time.time() - 10 * 3600


def fill(pool: Pool) -> Pool:
    for number, (name, (accuracy, lr)) in enumerate(NAMES.items()):
        record = Ingredient(
            fingerprint=name, determinants={"optimizer": {"lr": lr, "name": "adamw"}, "seed": number},
            metrics={"heldout": {"accuracy": accuracy, "loss": 0.1}}, created=f"2026-01-0{number + 1}T00:00:00+00:00",
        )  # fmt: skip
        added = pool.add(record, {"w": torch.full((4,), float(number))})
        pool.add_predictions(added.weights, "split", torch.zeros(2, 2))
    return pool


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return fill(Pool(tmp_path / "pool"))


def run(*arguments: object, code: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(
        app, ["pool", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"}, input=answer
    )
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def age(path: Path) -> None:
    for place in [*path.rglob("*"), path] if path.is_dir() else [path]:
        os.utime(place, (LONG_AGO, LONG_AGO))


def soup(tmp_path: Path, members: list[str], name: str = "greedy-1") -> Path:
    folder = tmp_path / "outputs" / "soups" / name
    folder.mkdir(parents=True)
    lineage = {"members": [{"fingerprint": member, "weights": "x"} for member in members], "soup": "c" * 64}
    write_json(folder / "report.json", {"lineage": lineage})
    return folder


def test_ls(pool: Pool) -> None:
    pool.fail(Failure(fingerprint="c" * 64, error="it diverged", determinants={}))
    lines = run("ls", pool.url).splitlines()
    assert lines[0].split() == ["ingredient", "held-out", "lr", "seed", "age", "size"], (
        "the name of the optimiser is the same"
    )
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["a2000000", "95.00%", "0.0003", "1"], ["a1000000", "90.00%", "0.0001", "0"], ["b1000000", "80.00%", "0.0001", "2"],
    ]  # fmt: skip
    assert "3 ingredients" in lines[4] and lines[5] == "failed: cccccccc  it diverged"
    listed = json.loads(run("ls", pool.url, "--json"))
    assert listed["ingredients"][0]["settings"] == {"optimizer.lr": 3e-4, "seed": 1}
    assert listed["failed"] == [{"fingerprint": "c" * 64, "error": "it diverged"}]


def test_a_damaged_record_hides_nothing_else(pool: Pool) -> None:
    path = Path(pool.folder.inner("ingredients", SECOND, "record.json"))
    path.write_text(path.read_text()[:50])
    shown = " ".join(run("ls", pool.url).split())
    assert "2 ingredients" in shown and "Warning:" in shown and "is not a whole ingredient record" in shown


def test_show_and_diff(pool: Pool) -> None:
    shown = run("show", pool.url, "b1")
    assert THIRD in shown and "heldout accuracy" in shown and "optimizer.lr" in shown
    assert json.loads(run("show", pool.url, "b1", "--json"))["fingerprint"] == THIRD
    rows = [line.split() for line in run("diff", pool.url, "a1", "a2").splitlines()]
    assert ["optimizer.lr", "0.0001", "0.0003"] in rows and ["heldout.accuracy", "0.9", "0.95", "+0.05"] in rows
    assert not any(row[:1] == ["optimizer.name"] for row in rows)
    compared = json.loads(run("diff", pool.url, "a1", "b1", "--json"))
    assert compared["settings"] == {"seed": [0, 2]} and compared["same_weights"] is False
    assert "fits more than one ingredient" in run("show", pool.url, "a", code=1)
    assert "is no ingredient of the pool" in " ".join(run("show", pool.url, "zz", code=1).split())


def test_a_mistyped_pool_is_not_made(tmp_path: Path) -> None:
    for command in (["ls"], ["gc"], ["rm", "a"], ["show", "a"]):
        assert "There is no pool at" in run(command[0], tmp_path / "nothing", *command[1:], code=1)
    assert list(tmp_path.iterdir()) == []


def test_rm_asks_and_removes_whole_ingredients(pool: Pool, tmp_path: Path) -> None:
    before = contents(tmp_path)
    run("rm", pool.url, "a1", "--output", tmp_path / "outputs", code=1, answer="n\n")
    run("rm", pool.url, "a1", "zz", "--yes", "--output", tmp_path / "outputs", code=1)
    assert contents(tmp_path) == before, "one name is wrong: none is removed"
    run("rm", pool.url, "a1", "--output", tmp_path / "outputs", answer="y\n")
    after = contents(tmp_path)
    assert pool.names() == [SECOND, THIRD]
    assert after == {name: data for name, data in before.items() if f"ingredients/{FIRST}" not in name}


def test_rm_refuses_what_a_soup_came_from(pool: Pool, tmp_path: Path) -> None:
    folder = soup(tmp_path, [SECOND])
    before = contents(tmp_path)
    said = " ".join(run("rm", pool.url, "a1", "a2", "--yes", "--output", tmp_path / "outputs", code=1).split())
    assert f"a2000000 is in {folder}" in said and "--force" in said and contents(tmp_path) == before
    (folder / "report.json").write_text("{")
    assert "is not known" in " ".join(
        run("rm", pool.url, "b1", "--yes", "--output", tmp_path / "outputs", code=1).split()
    )
    run("rm", pool.url, "a2", "--yes", "--force", "--output", tmp_path / "outputs")
    assert pool.names() == [FIRST, THIRD]


@pytest.mark.parametrize("moment", ["rename", "delete"])
def test_a_fault_while_removing_leaves_whole_ingredients(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail) if moment == "rename" else patched.setattr(shutil, "rmtree", fail)
        assert "permission was denied" in " ".join(run("rm", pool.url, "a1", "--yes", code=1).split())
    gone = moment == "delete"
    assert pool.names() == ([SECOND, THIRD] if gone else [FIRST, SECOND, THIRD])
    for name in pool.names():
        pool.weights(name, verify=True)
    items, _ = leftovers(pool, None, age=-1)
    assert sum(item.reason == "left by a killed writer" for item in items) == gone


def litter(pool: Pool) -> set[Path]:
    """Leave in a pool what killed runs leave; return what nothing needs."""
    root = Path(str(pool.folder.root))
    pool.fail(Failure(fingerprint="f" * 64, error="still true", determinants={}))
    half = root / "ingredients" / ".ffff.12345678.tmp"
    upload = root / "starts" / ("e" * 64)
    for folder in (half, upload):
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"half")
    (root / "progress").mkdir()
    with pool.lock("start-1"):
        pass
    files = [
        root / ".writable-0123abcd", root / "predictions" / ".x.safetensors.12345678.tmp", root / "progress" / f"{FIRST}.json",
        root / "failures" / f"{FIRST}.json", root / "predictions" / f"{'d' * 24}-{'s' * 24}.safetensors",
    ]  # fmt: skip
    for file in files:
        file.write_text("{}")
    return {half, upload, *files, *(path for path in [root / "locks" / "start-1.lock"] if path.exists())}


def test_gc_removes_what_nothing_needs_and_only_that(pool: Pool, tmp_path: Path) -> None:
    soup(tmp_path, [SECOND])
    pool.add_predictions("c" * 64, "split", torch.zeros(2, 2))  # of the finished soup
    before = contents(tmp_path)
    extra = litter(pool)
    assert run("gc", pool.url, "--output", tmp_path / "outputs").startswith("Nothing to remove"), (
        "a run may be writing them"
    )
    for path in extra:
        age(path)
    listed = run("gc", pool.url, "--output", tmp_path / "outputs", "--dry-run")
    assert all(f"{path}  " in listed for path in extra) and all(path.exists() for path in extra)
    assert listed.count("\n") == len(extra) + 1 and "1 predictions of absent weights" in listed
    run("gc", pool.url, "--output", tmp_path / "outputs")
    left = contents(tmp_path)
    kept = {name for name in left if name.startswith("pool/failures")}
    assert kept == {f"pool/failures/{'f' * 64}.json"}, "a failure that still stands is kept"
    assert {name: data for name, data in left.items() if name not in kept} == before
    assert not any(path.exists() for path in extra)


def test_gc_leaves_a_lock_that_is_held(pool: Pool) -> None:
    program = "import sys, time; from soups.stores.pool import Pool\nwith Pool(sys.argv[1]).lock('start'): print('in', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, pool.url], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "in\n"
        path = Path(pool.folder.inner("locks", "start.lock"))
        age(path)
        assert leftovers(pool, None, age=-1)[0] == []
    finally:
        holder.kill()
        holder.wait()
    assert [item.path for item in leftovers(pool, None, age=-1)[0]] == ([str(path)] if path.exists() else [])


def test_gc_keeps_predictions_when_it_cannot_know_whose_they_are(pool: Pool, tmp_path: Path) -> None:
    for path in litter(pool):
        age(path)
    record = Path(pool.folder.inner("ingredients", SECOND, "record.json"))
    record.write_text(record.read_text()[:50])
    said = " ".join(run("gc", pool.url, "--output", tmp_path / "outputs").split())
    assert "Predictions are left alone" in said and "left by a killed writer" in said
    assert len(list(Path(pool.folder.inner("predictions")).iterdir())) == 4


def test_gc_stops_at_a_fault_and_goes_on_later(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in litter(pool):
        age(path)
    items, _ = leftovers(pool, None, age=3600)
    whole = {name: pool.weights(name, verify=True)["w"] for name in pool.names()}
    original, calls = type(pool.folder.files).rm, []

    def fail_second(self, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EROFS, "read-only")
        original(self, path, **options)

    monkeypatch.setattr(type(pool.folder.files), "rm", fail_second)
    assert "disk is read-only" in " ".join(run("gc", pool.url, code=1).split())
    monkeypatch.undo()
    again, _ = leftovers(pool, None, age=3600)
    assert len(again) == len(items) - 1
    remove(pool, again)
    assert leftovers(pool, None, age=3600)[0] == []
    assert all(torch.equal(pool.weights(name, verify=True)["w"], value) for name, value in whole.items())


def test_the_same_on_remote_storage() -> None:
    pool = fill(Pool("memory://pool-commands"))
    pool.folder.files.makedirs(pool.folder.inner("ingredients", "9" * 64))
    pool.folder.files.pipe_file(pool.folder.inner("ingredients", "9" * 64, "weights.safetensors"), b"half")
    pool.remove(FIRST)
    assert pool.names() == [SECOND, THIRD] and not pool.folder.files.exists(pool.folder.inner("ingredients", FIRST))
    items, notes = leftovers(pool, None, age=-60)
    assert sorted(item.reason for item in items) == ["half uploaded", "predictions of absent weights"] and notes == []
    assert remove(pool, items) > 0 and leftovers(pool, None, age=-60)[0] == []
    pool.weights(SECOND, verify=True)


def test_lineage_is_searched_at_any_depth() -> None:
    found = {Path("a"): {"x": [{"y": FIRST}]}, Path("b"): {"x": FIRST[:10]}}
    assert needed_by(FIRST, found) == [Path("a")]


def test_the_program_starts_without_torch() -> None:
    program = "import sys, soups.cli; assert 'torch' not in sys.modules and 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
