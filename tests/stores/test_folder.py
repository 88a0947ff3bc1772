import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.errors import StorageError
from soups.stores import FolderWriter, TensorMeta, open_store

WEIGHTS = {f"layers.{i}.w": torch.randn(4, 8) for i in range(5)} | {"norm": torch.ones(3)}


def write(path, weights=WEIGHTS, shard_bytes=300, **options):
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    with FolderWriter(path, plan, shard_bytes=shard_bytes, **options) as writer:
        for name, tensor in weights.items():
            writer.write_flat(name, 0, tensor)
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", files={"config.json": b"{}"})


def test_shards_and_index_are_what_hugging_face_expects(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS.values())
    for name, tensor in WEIGHTS.items():
        assert torch.equal(load_file(folder / index["weight_map"][name])[name], tensor)
    with open_store(folder) as store:
        assert set(store.keys()) == set(WEIGHTS)
        assert torch.equal(store.read("layers.3.w", slice(1, 2)), WEIGHTS["layers.3.w"][1:2])


def test_one_shard_has_no_index(tmp_path):
    folder = write(tmp_path / "model", shard_bytes=10**9)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_bin_shards(tmp_path):
    names = list(WEIGHTS)
    for number, part in enumerate((names[:3], names[3:])):
        torch.save({name: WEIGHTS[name].clone() for name in part}, tmp_path / f"part{number}.bin")
    index = {name: f"part{int(name in names[3:])}.bin" for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    with open_store(tmp_path) as store:
        assert torch.equal(store.read("norm"), WEIGHTS["norm"])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    plan = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()}
    writer = FolderWriter(tmp_path / "model", plan)
    writer.write_flat("norm", 0, WEIGHTS["norm"])
    writer.__exit__(KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(Exception, match="5 tensors were not written whole"),
        FolderWriter(tmp_path / "m", plan) as writer,
    ):
        writer.write_flat("norm", 0, WEIGHTS["norm"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_allowed(folder):
    with pytest.raises(StorageError, match="already"):
        write(folder)
    changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    write(folder, changed, overwrite=True)
    assert (folder / "config.json").exists(), "what is not written is not touched"
    with open_store(folder) as store:
        assert torch.equal(store.read("norm"), WEIGHTS["norm"] + 1)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_no_space_left(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match=r"0\.00 GB free"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_absent_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match="names 1 of 3 shards"):
        open_store(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(StorageError, match="lacks shard 'model-00002"):
        open_store(folder)


def test_a_tensor_in_two_shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["norm"]
    save_file({**load_file(shard), "layers.0.w": torch.zeros(4, 8)}, shard)
    with pytest.raises(StorageError, match=r"'layers.0.w' is in both"):
        open_store(folder)


def test_an_index_that_lies(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], "ghost": "model-00001-of-00003.safetensors"}})
    )
    with pytest.raises(StorageError, match="do not agree on 1 tensors, 'ghost'"):
        open_store(folder)
    for text in ("[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": {}}'):
        path.write_text(text)
        with pytest.raises(StorageError, match="not a whole index"):
            open_store(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd"])
def test_an_index_that_points_out_of_the_folder(folder, name):
    save_file(WEIGHTS, folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, name)}))
    with pytest.raises(StorageError, match="leads out of its folder"):
        open_store(folder)


def test_links_out_of_the_folder_are_refused_but_the_hub_cache_works(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(WEIGHTS, blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    with open_store(snapshot) as store:
        assert set(store.keys()) == set(WEIGHTS)
    outside = tmp_path / "plain"
    outside.mkdir()
    (outside / "model.safetensors").symlink_to(blobs / "123")
    with pytest.raises(StorageError, match="leads out of its folder"):
        open_store(outside)


def test_folders_without_weights(tmp_path):
    (tmp_path / "readme").write_text("x")
    with pytest.raises(StorageError, match="holds no weights"):
        open_store(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match="LoRA adapter"):
        open_store(tmp_path)
    with pytest.raises(StorageError, match="no checkpoint at"):
        open_store(tmp_path / "nothing")
