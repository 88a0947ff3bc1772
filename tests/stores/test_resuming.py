"""A folder of several shards goes on where a killed process left it, and only if it would become the same folder."""

import os
import signal
from pathlib import Path

import pytest
import torch

from soups.errors import StorageError, WeightsError
from soups.merging import Method, make_method, merge
from soups.stores import FolderWriter, TensorMeta, open_store, write_safetensors

NAMES = ["a", "b", "c", "d"]
PLAN = {name: TensorMeta((1000,), torch.float32) for name in NAMES}


def inputs(root: Path) -> list[Path]:
    paths = []
    for number in range(3):
        path = root / f"m{number}.safetensors"
        generator = torch.Generator().manual_seed(number)
        write_safetensors(path, {name: torch.randn(40_000, generator=generator) for name in NAMES})
        paths.append(path)
    return paths


def unfinished(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name.endswith(".unfinished")]


def merge_and_die(method, paths, out):
    """Merge in a process that kills itself in the middle of the third shard; return how it ended."""
    child = os.fork()
    if child == 0:
        put = FolderWriter._put

        def hooked(self, name, offset, data):
            put(self, name, offset, data)
            if name == "c" and offset:
                os.kill(os.getpid(), signal.SIGKILL)

        FolderWriter._put = hooked
        try:
            merge(method, paths[1:], base=paths[0], out=out, shard_bytes=160_000, threads=1, budget=1)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.fixture
def killed(tmp_path, request):
    """Inputs, and the output that a killed process was making."""
    paths = inputs(tmp_path)
    assert merge_and_die(getattr(request, "param", "ties"), paths, tmp_path / "out") == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (folder,) = unfinished(tmp_path)
    whole = sorted(path.name for path in folder.glob("*.safetensors"))
    assert whole == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2)]
    return paths, tmp_path / "out", folder


def count_written(monkeypatch) -> set[str]:
    written: set[str] = set()
    put = FolderWriter._put

    def counted(self, name, offset, data):
        written.add(name)
        put(self, name, offset, data)

    monkeypatch.setattr(FolderWriter, "_put", counted)
    return written


@pytest.mark.parametrize("killed", ["linear", "ties"], indirect=True)
def test_finished_shards_are_not_made_again_and_the_bits_are_the_same(killed, tmp_path, monkeypatch, request):
    paths, out, folder = killed
    method = request.node.callspec.params["killed"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    written = count_written(monkeypatch)
    merge(method, paths[1:], base=paths[0], out=out, shard_bytes=160_000, threads=2)
    assert written == {"c", "d"}
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert unfinished(tmp_path) == []
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    expected = merge(method, paths[1:], base=paths[0])
    with open_store(out) as store:
        loaded = store.load()
    assert all(torch.equal(loaded[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("change", ["parameter", "input", "shards"])
def test_whatever_decides_the_bits_begins_anew(killed, tmp_path, monkeypatch, change):
    paths, out, folder = killed
    method, shards = "ties", 160_000
    if change == "parameter":
        method = make_method("ties", density=0.3)
    elif change == "input":
        os.utime(paths[1], (1, 1))
    else:
        shards = 320_000
    written = count_written(monkeypatch)
    merge(method, paths[1:], base=paths[0], out=out, shard_bytes=shards)
    assert written == set(NAMES)
    assert unfinished(tmp_path) == [] and not folder.exists()


def test_a_damaged_shard_is_made_again(killed, monkeypatch):
    paths, out, folder = killed
    shard = folder / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    written = count_written(monkeypatch)
    merge("ties", paths[1:], base=paths[0], out=out, shard_bytes=160_000)
    assert written == {"a", "c", "d"}


class Failing(Method):
    def combine(self, chunk, seen):
        if chunk.key == "d":
            raise WeightsError("as a full disk would")
        return chunk.models[0]

    def __repr__(self):
        return "Failing()"


def test_an_error_keeps_what_is_finished_and_its_absence_is_no_problem(tmp_path):
    paths = inputs(tmp_path)
    with pytest.raises(WeightsError, match="full disk"):
        merge(Failing(), paths, out=tmp_path / "out", shard_bytes=160_000, threads=1)
    (folder,) = unfinished(tmp_path)
    assert sorted(path.name[:11] for path in folder.iterdir() if path.suffix == ".safetensors") == [
        f"model-{i:05d}" for i in (1, 2, 3)
    ]
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    with pytest.raises(WeightsError):  # one shard: nothing is finished, nothing is left
        merge(Failing(), paths, out=tmp_path / "single", threads=1)
    assert not [path for path in unfinished(tmp_path) if "single" in path.name]


def test_weights_in_memory_have_no_fingerprint_and_leave_nothing(tmp_path):
    weights = {name: torch.ones(40_000) for name in NAMES}
    with pytest.raises(WeightsError):
        merge(Failing(), [weights], out=tmp_path / "out", shard_bytes=160_000, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_output_do_not_meet(tmp_path):
    first = FolderWriter(tmp_path / "out", PLAN, shard_bytes=4000, fingerprint="f" * 64)
    try:
        with pytest.raises(StorageError, match="Another process is writing"):
            FolderWriter(tmp_path / "out", PLAN, shard_bytes=4000, fingerprint="f" * 64)
        # One of another fingerprint leaves it alone.
        with FolderWriter(tmp_path / "out", PLAN, fingerprint="0" * 64) as second:
            for name in NAMES:
                second.write_flat(name, 0, torch.zeros(1000))
        for name in NAMES:
            first.write_flat(name, 0, torch.ones(1000))
    finally:
        first.abort()
    with open_store(tmp_path / "out") as store:
        assert torch.equal(store.read("a"), torch.zeros(1000))


def test_empty_tensors_belong_to_their_shard(tmp_path):
    plan = {
        "a": TensorMeta((0,), torch.float32),
        "b": TensorMeta((10,), torch.float32),
        "c": TensorMeta((0, 3), torch.float32),
    }
    with FolderWriter(tmp_path / "out", plan, shard_bytes=40, fingerprint="f" * 64) as writer:
        writer.write_flat("b", 0, torch.ones(10))
    with open_store(tmp_path / "out") as store:
        assert store.meta("c").shape == (0, 3) and torch.equal(store.read("b"), torch.ones(10))
