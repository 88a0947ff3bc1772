"""The folder that several write to: files are whole, and an exclusive one is made once, on every kind of storage."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from soups.errors import StorageError
from soups.stores.pool import Pool
from soups.stores.records import Ingredient
from soups.stores.shared import NotExclusiveError, SharedFolder
from tests.stores.s3 import bucket_url, s3_server

__all__ = ["bucket_url", "s3_server"]  # fixtures


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> SharedFolder:
    if request.param == "s3":
        return SharedFolder(request.getfixturevalue("bucket_url"))
    return SharedFolder(tmp_path / "place" if request.param == "local" else f"memory://{tmp_path.name}/place")


def test_what_is_written_is_there(folder: SharedFolder, tmp_path: Path) -> None:
    assert folder.names() == [] and folder.names("a/b") == [] and folder.size("a/b/one") is None
    assert not folder.exists("a/b/one")
    with pytest.raises(FileNotFoundError):
        folder.read("a/b/one")
    folder.write("a/b/one", b"1")
    folder.write("a/b/one", b"one")
    (tmp_path / "large").write_bytes(b"x" * 1000)
    folder.put("a/b/two", tmp_path / "large")
    assert folder.read("a/b/one") == b"one" and folder.size("a/b/two") == 1000 and folder.names("a/b") == ["one", "two"]
    with folder.fetched("a/b/two") as local:
        assert local.read_bytes() == b"x" * 1000
    with folder.fetched("a/b/three") as local:
        assert not local.exists()
    folder.remove("a/b/one")
    folder.remove("a/b/one")
    assert folder.names("a/b") == ["two"]
    folder.remove("a", recursive=True)
    assert not folder.exists("a/b/two")


def test_a_new_file_is_made_once(folder: SharedFolder) -> None:
    assert folder.create("rounds/1.json", b"first") and not folder.create("rounds/1.json", b"second")
    assert folder.read("rounds/1.json") == b"first" and folder.names("rounds") == ["1.json"]
    assert folder.names() == ["rounds"], "a trial leaves nothing"


def test_of_many_callers_one_makes_the_file(tmp_path: Path, bucket_url: str) -> None:
    for url in (tmp_path / "place", bucket_url):
        barrier = threading.Barrier(8)

        def create(number: int, url: str | Path = url, barrier: threading.Barrier = barrier) -> bool:
            place = SharedFolder(url)
            barrier.wait()
            return place.create("record", str(number).encode())

        with ThreadPoolExecutor(8) as executor:
            made = list(executor.map(create, range(8)))
        assert sum(made) == 1 and SharedFolder(url).read("record") == str(made.index(True)).encode()


@pytest.mark.parametrize("kind", ["refuses", "ignores"])
def test_storage_that_cannot_create_exclusively_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that takes the request and overwrites all the same. Nothing is written; a pool replaces its record whole."""
    pipe = MemoryFileSystem.pipe_file

    def without(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        if mode == "create" and kind == "refuses":
            raise NotImplementedError("no exclusive creation")
        pipe(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", without)
    folder = SharedFolder(f"memory://exclusive-{kind}")
    folder.write("record", b"old")
    with pytest.raises(NotExclusiveError, match=r"cannot create a file only if it is new: .*local disk, or S3"):
        folder.create("record", b"new")
    assert folder.read("record") == b"old" and folder.entries() == folder.entries("") and folder.names() == ["record"]
    assert [entry for entry in folder.entries() if "exclusive" in entry["name"].rpartition("/")[2]] == []
    import torch

    pool = Pool(f"memory://exclusive-pool-{kind}")
    pool.add(Ingredient(fingerprint="a" * 64, determinants={}), {"w": torch.ones(2)})
    assert pool.names() == ["a" * 64] and torch.equal(pool.weights("a" * 64, verify=True)["w"], torch.ones(2))


def test_a_disk_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(NotExclusiveError, match="no hard links"):
        SharedFolder(tmp_path).create("record", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_bucket_is_not_made(bucket_url: str) -> None:
    folder = SharedFolder("s3://no-such-bucket/pool")
    with pytest.raises(StorageError, match="Cannot write the folder s3://no-such-bucket/pool"):
        folder.create("record", b"new")
    with pytest.raises(StorageError, match="Cannot write the folder s3://no-such-bucket/pool"):
        folder.write("record", b"new")
    assert not fsspec.filesystem("s3").exists("no-such-bucket")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (SharedFolder(tmp_path).create, SharedFolder(tmp_path).write):
        with pytest.raises(StorageError, match="the disk is full"):
            write("record", b"new")
        assert list(tmp_path.iterdir()) == []
