"""Files and ingredients are whole or absent, whatever happens while they are written; damage is named, with the way out."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from soups.errors import StorageError, WeightsError
from soups.stores import SafetensorsStore, read_safetensors, write_safetensors
from soups.stores.files import replacing, replacing_folder, write_text
from soups.stores.pool import Pool
from soups.stores.records import Failure, Ingredient
from soups.weights import tied_names

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.count": torch.tensor(3)}


def record(name: str = "a" * 64) -> Ingredient:
    return Ingredient(fingerprint=name, determinants={"lr": 0.1}, metrics={"heldout": {"accuracy": 0.5}})


@pytest.fixture(params=["local", "memory"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    """The same behaviour on a folder and on an fsspec URL."""
    return Pool(tmp_path / "pool") if request.param == "local" else Pool(f"memory://{tmp_path.name}/pool")


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_replacing_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"the disk is full: free some space"):
        write_text(target, "new")
    assert target.read_text() == "old" and leftovers(tmp_path) == []


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    program = f"""
        import os, signal
        from pathlib import Path
        from soups.stores.files import replacing
        with replacing(Path({str(target)!r})) as temporary:
            temporary.write_text("half of the n")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_an_error_in_the_block_is_not_hidden_and_leaves_nothing(tmp_path: Path) -> None:
    def write_half(context: AbstractContextManager[Path], name: str) -> None:
        with context as temporary:
            (temporary / name if name else temporary).write_text("half")
            raise KeyError("user's own")

    with pytest.raises(KeyError):
        write_half(replacing(tmp_path / "file"), "")
    with pytest.raises(KeyError):
        write_half(replacing_folder(tmp_path / "folder"), "part")
    assert list(tmp_path.iterdir()) == []


def test_the_second_writer_of_a_folder_leaves_the_first_ones(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "folder" / "file").read_text() == "first" and leftovers(tmp_path) == []


def test_safetensors_keep_ties_dtypes_layouts_and_metadata(tmp_path: Path) -> None:
    shared, fused = torch.randn(4, 2), torch.randn(6, 2)
    weights = {
        "embed": shared,
        "head": shared,
        "q": fused[:3],
        "k": fused[3:],
        "transposed": torch.randn(3, 5).t(),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    path = tmp_path / "w.safetensors"
    write_safetensors(path, weights, {"note": "x"})
    loaded = read_safetensors(path)
    assert set(loaded) == set(weights)
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert tied_names(loaded) == {"head": "embed"}
    with SafetensorsStore(path) as store:
        assert store.metadata["note"] == "x"
        assert store.meta("head") == store.meta("embed") == ((4, 2), torch.float32)
        assert torch.equal(store.read("head", slice(1, 3)), shared[1:3])


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_safetensors_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:keep])
    problem = "is not a whole safetensors file" if keep else "is empty"
    with pytest.raises(StorageError, match=rf"w\.safetensors {problem}"):
        read_safetensors(path)


def test_an_ingredient_comes_back_as_it_went_in(pool: Pool) -> None:
    assert pool.ingredients() == [] and "a" * 64 not in pool
    added = pool.add(record(), WEIGHTS)
    assert "a" * 64 in pool
    assert [found.fingerprint for found in pool.ingredients()] == ["a" * 64]
    assert pool.ingredient("a" * 64) == added
    loaded = pool.weights("a" * 64, verify=True)
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)
    assert added.weights and added.architecture and added.file_bytes > 0


def test_finished_work_stays(pool: Pool) -> None:
    first = pool.add(record(), WEIGHTS)
    second = pool.add(record(), {name: tensor + 1 for name, tensor in WEIGHTS.items()})
    assert second == first
    assert torch.equal(pool.weights("a" * 64)["layer.weight"], WEIGHTS["layer.weight"])


def test_non_finite_weights_never_enter(pool: Pool) -> None:
    with pytest.raises(WeightsError, match=r"ingredient aaaaaaaa: tensor 'layer.weight' holds 1 non-finite"):
        pool.add(record(), {**WEIGHTS, "layer.weight": torch.tensor([1.0, float("nan")])})
    assert pool.ingredients() == []


def test_failures_are_kept_until_success(pool: Pool) -> None:
    pool.fail(Failure(fingerprint="a" * 64, error="it diverged", determinants={}))
    failure = pool.failure("a" * 64)
    assert failure is not None and failure.error == "it diverged"
    pool.add(record(), WEIGHTS)
    assert pool.failure("a" * 64) is None


def test_predictions_are_stored_by_weights_and_split(pool: Pool) -> None:
    logits = torch.randn(5, 3)
    assert pool.predictions("w1", "s1") is None
    pool.add_predictions("w1", "s1", logits)
    found = pool.predictions("w1", "s1")
    assert found is not None and torch.equal(found, logits)
    assert pool.predictions("w1", "s2") is None and pool.predictions("w2", "s1") is None


def test_a_missing_ingredient_names_those_there(pool: Pool) -> None:
    pool.add(record("b" * 64), WEIGHTS)
    with pytest.raises(StorageError, match=r"no ingredient aaaaaaaa; it has: bbbbbbbb"):
        pool.ingredient("a" * 64)


def test_damage_names_the_folder_and_the_way_out(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.add(record(), WEIGHTS)
    path = tmp_path / "ingredients" / ("a" * 64) / "weights.safetensors"
    whole = path.read_bytes()

    path.write_bytes(whole[:-4])
    with pytest.raises(StorageError, match=r"has \d+ bytes; \d+ were written. Remove the folder .*aaaa"):
        pool.weights("a" * 64)

    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    pool.weights("a" * 64)  # a changed value is not looked for by default …
    with pytest.raises(StorageError, match="altered after it was written"):
        pool.weights("a" * 64, verify=True)  # … but is found on request

    path.write_bytes(
        whole[: len(whole) - 24] + torch.tensor([float("nan")]).numpy().tobytes() + whole[len(whole) - 20 :]
    )
    with pytest.raises(WeightsError, match=r"weights\.safetensors: tensor 'layer.weight' holds 1 non-finite"):
        pool.weights("a" * 64)

    path.unlink()
    with pytest.raises(StorageError, match="is absent"):
        pool.weights("a" * 64)


@pytest.mark.parametrize("change", ["rename", "shape"])
def test_other_tensors_than_recorded(tmp_path: Path, change: str) -> None:
    pool = Pool(tmp_path)
    added = pool.add(record(), WEIGHTS)
    path = tmp_path / "ingredients" / ("a" * 64) / "weights.safetensors"
    other = {
        "renamed.weight" if change == "rename" else "layer.weight": torch.zeros(3, 2),
        "layer.count": torch.tensor(3),
    }
    write_safetensors(path, other)
    found = json.loads((path.parent / "record.json").read_text()) | {"file_bytes": path.stat().st_size}
    (path.parent / "record.json").write_text(json.dumps(found))
    assert added.file_bytes
    with pytest.raises(WeightsError, match="does not hold the tensors that its record names"):
        pool.weights("a" * 64)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.add(record(), WEIGHTS)
    path = tmp_path / "ingredients" / ("a" * 64) / "record.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(StorageError, match=r"record\.json is not a whole ingredient record .* Remove the folder"):
        pool.ingredients()


def test_half_written_ingredients_are_never_seen(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.add(record(), WEIGHTS)
    for name in (".bbbb.12345678.tmp", "c" * 64):  # a killed local writer; an interrupted upload
        folder = tmp_path / "ingredients" / name
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    assert [found.fingerprint for found in pool.ingredients()] == ["a" * 64]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    pool = Pool(tmp_path / "pool")
    pool.check_writable()
    pool.add(record("b" * 64), WEIGHTS)

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    expected = {errno.ENOSPC: "disk is full", errno.EROFS: "disk is read-only", errno.EACCES: "permission was denied"}
    with pytest.raises(StorageError, match=rf"Cannot write the pool .*{expected[code]}|{expected[code]}"):
        pool.add(record(), WEIGHTS)
    monkeypatch.undo()
    assert [found.fingerprint for found in pool.ingredients()] == ["b" * 64] and leftovers(tmp_path) == []


def test_a_pool_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"Cannot write the pool .*file"):
        Pool(tmp_path / "file" / "pool").check_writable()
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_protocol() -> None:
    with pytest.raises(StorageError, match="Cannot open the pool nowhere://"):
        Pool("nowhere://bucket/pool")


def test_many_writers_of_one_name(tmp_path: Path) -> None:
    def write(number: int) -> str:
        return Pool(tmp_path).add(record(), {"w": torch.full((1000,), float(number))}).weights

    with ThreadPoolExecutor(8) as executor:
        hashes = set(executor.map(write, range(16)))
    assert len(hashes) == 1, "all writers get the one that is there"
    assert leftovers(tmp_path) == []
    assert len(set(Pool(tmp_path).weights("a" * 64)["w"].tolist())) == 1


def test_locks_let_one_process_in(tmp_path: Path) -> None:
    program = """
        import sys, time
        from soups.stores.pool import Pool
        pool = Pool(sys.argv[1])
        with pool.lock("start"):
            made = pool.folder.root / "made"
            with open(made, "a") as file:
                file.write("in ")
                file.flush()
                time.sleep(0.3)
                file.write("out ")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "made").read_text() == "in out in out "
