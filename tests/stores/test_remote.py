"""Outputs behind fsspec URLs: whole or not a model, and continued after an interruption."""

import json

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from soups.errors import StorageError
from soups.merging import merge
from soups.stores import open_store, write_safetensors

NAMES = ["a", "b", "c"]


@pytest.fixture
def url(tmp_path):
    yield f"memory://{tmp_path.name}/out"
    MemoryFileSystem.store.clear()


@pytest.fixture
def models(tmp_path):
    paths = [tmp_path / f"m{i}" for i in range(2)]
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        path.mkdir()
        write_safetensors(path / "model.safetensors", {n: torch.randn(5000, generator=generator) for n in NAMES})
        (path / "config.json").write_text("{}")
    return paths


def listed(url):
    system, path = fsspec.url_to_fs(url)
    return sorted(place.rpartition("/")[2] for place in system.ls(path, detail=False))


def same(url, expected):
    with open_store(url) as store:
        loaded = store.load()
    assert sorted(loaded) == sorted(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
def test_a_folder(url, models, shard_bytes):
    assert merge("linear", models, out=url, shard_bytes=shard_bytes) == url
    same(url, merge("linear", models))
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    expected = [*shards, "model.safetensors.index.json"] if shard_bytes < 10**9 else ["model.safetensors"]
    assert listed(url) == ["config.json", *expected]
    with pytest.raises(StorageError, match="There is a model at memory"):
        merge("linear", models, out=url)
    # Another layout replaces the old one, and nothing of that is left.
    merge("median", models, out=url, overwrite=True, shard_bytes=30_000 + 10**9 - shard_bytes)
    same(url, merge("median", models))
    assert len(listed(url)) <= 5 and not [name for name in listed(url) if "00003" in name and shard_bytes < 10**9]


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".ckpt"])
def test_a_file(url, models, ending):
    merge("linear", models, out=url + ending)
    same(url + ending, merge("linear", models))
    with pytest.raises(StorageError, match="There is something at"):
        merge("linear", models, out=url + ending)


def test_an_interrupted_upload_is_no_model_and_goes_on(url, models, monkeypatch):
    uploads = []
    put = MemoryFileSystem.put_file

    def counted(self, local, remote, **options):
        uploads.append(remote.rpartition("/")[2])
        if len(uploads) == 2:
            raise ConnectionResetError("the line is dead")
        return put(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counted)
    with pytest.raises(StorageError, match=r"the line is dead.*was written whole is not made again"):
        merge("linear", models, out=url, shard_bytes=20_000, threads=1)
    assert listed(url) == ["model-00001-of-00003.safetensors"]
    with pytest.raises(StorageError, match="lacks shard"):
        open_store(url)
    merge("linear", models, out=url, shard_bytes=20_000, threads=1)
    assert uploads[2:] == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert "config.json" in listed(url)
    same(url, merge("linear", models))


def test_shards_of_another_merge_are_replaced(url, models):
    merge("median", models, out=url, shard_bytes=20_000)
    system, path = fsspec.url_to_fs(url)
    system.rm_file(f"{path}/model.safetensors.index.json")
    merge("linear", models, out=url, shard_bytes=20_000)
    same(url, merge("linear", models))


def test_overwriting_replaces_a_model_and_leaves_other_files(url, models):
    system, path = fsspec.url_to_fs(url)
    merge("median", models, out=url, shard_bytes=20_000)
    others = {"notes.txt": b"mine", "model-of-mine.safetensors": b"mine", "model-00001-of-00002.bin": b"mine"}
    for name, content in others.items():
        system.pipe_file(f"{path}/{name}", content)
    merge("linear", models, out=url, overwrite=True)
    for name, content in others.items():
        assert system.cat_file(f"{path}/{name}") == content
        system.rm_file(f"{path}/{name}")
    assert listed(url) == ["config.json", "model.safetensors"]
    same(url, merge("linear", models))


def test_a_remote_folder_is_read_with_the_same_checks(url, models):
    merge("linear", models, out=url, shard_bytes=20_000)
    system, path = fsspec.url_to_fs(url)
    system.rm_file(f"{path}/model-00002-of-00003.safetensors")
    with pytest.raises(StorageError, match="names 1 of 3 shards that are not there"):
        open_store(url)
    index = json.loads(system.cat_file(f"{path}/model.safetensors.index.json"))
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere/model.safetensors")
    system.pipe_file(f"{path}/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(StorageError, match="leads out of its folder"):
        open_store(url)


def test_an_output_is_never_an_input(url, models):
    merge("linear", models, out=url)
    with pytest.raises(StorageError, match="in one place"):
        merge("linear", [url, models[0]], out=url, overwrite=True)
