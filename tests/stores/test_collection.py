"""Checkpoints from elsewhere: found, fitted to a network's names, told apart, and their classes read."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from soups.errors import StorageError, WeightsError
from soups.stores import find_checkpoints, open_fitted, recorded_classes, write_safetensors
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(3)


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Tied().state_dict()


def test_a_folder_is_searched_and_names_are_short_and_unique(tmp_path: Path) -> None:
    for name in (
        "a.ckpt",
        "a.pth",
        "best.pth.tar",
        "sub/epoch=1-val=0.9.ckpt",
        ".hidden/x.ckpt",
        "hf/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "hf" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "log.txt").write_bytes(b"")
    found = find_checkpoints(tmp_path)
    assert list(found) == ["a.ckpt", "a.pth", "best", "hf", "sub/epoch=1-val=0.9"]
    assert found["hf"] == str(tmp_path / "hf")
    assert list(find_checkpoints(tmp_path / "hf")) == ["hf"], "a model folder is one checkpoint"
    twice = find_checkpoints([tmp_path / "a.ckpt", tmp_path / "sub" / ".." / "a.ckpt", "s3://bucket/m.safetensors"])
    assert len(twice) == 3 and "s3://bucket/m" in twice
    with pytest.raises(StorageError, match=r"no checkpoint at .*b\.ckpt"):
        find_checkpoints([tmp_path / "b.ckpt"])
    (tmp_path / "none").mkdir()
    with pytest.raises(StorageError, match="holds no checkpoints"):
        find_checkpoints(tmp_path / "none")


def test_prefixes_are_found_and_tied_names_completed(tmp_path: Path) -> None:
    like, weights = state(), state(1)
    torch.save(
        {"state_dict": {f"net.model.{k}": v for k, v in weights.items()} | {"loss.w": torch.ones(2)}},
        tmp_path / "l.ckpt",
    )
    with open_fitted(tmp_path / "l.ckpt", like) as store:
        loaded = store.load()
    assert set(loaded) == set(like)
    assert all(torch.equal(loaded[name], weights[name]) for name in like)
    one_name = {name: tensor.clone() for name, tensor in weights.items() if name != "head.weight"}
    write_safetensors(tmp_path / "hf.safetensors", one_name)
    with open_fitted(tmp_path / "hf.safetensors", like) as store:
        loaded = store.load()
        assert store.tied() == {"head.weight": "embed.weight"}
    assert loaded["head.weight"] is loaded["embed.weight"]
    extra = {**weights, "unknown": torch.zeros(1)}
    torch.save(extra, tmp_path / "extra.pth")
    with pytest.raises(WeightsError, match=r"extra\.pth does not fit the model: 1 unexpected \('unknown'\)"):
        open_fitted(tmp_path / "extra.pth", like)
    with pytest.raises(WeightsError, match=r"no tensor|does not fit"):
        open_fitted(tmp_path / "l.ckpt", like, prefix="other.")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, ["cat", "dog"]),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"label2id": {"dog": 1, "cat": 0}}, ["cat", "dog"]),
        ({"hyper_parameters": {"classes": ["b", "a"]}}, ["b", "a"]),
        ({"datamodule_hyper_parameters": {"class_to_idx": {"x": 1, "y": 0}}}, ["y", "x"]),
        ({"id2label": {"0": "cat", "2": "dog"}}, None),
        ({"hyper_parameters": {"classes": 10}}, None),
    ],
)
def test_recorded_classes(content: dict, expected: list[str] | None, tmp_path: Path) -> None:
    torch.save({"state_dict": state(), **content}, tmp_path / "m.ckpt")
    assert recorded_classes(tmp_path / "m.ckpt") == expected
    (tmp_path / "hf").mkdir()
    write_safetensors(tmp_path / "hf" / "model.safetensors", state())
    assert recorded_classes(tmp_path / "hf") is None
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    assert recorded_classes(tmp_path / "hf") == expected
    write_safetensors(tmp_path / "soup.safetensors", state(), {"lineage": json.dumps({"classes": ["0", "1"]})})
    assert recorded_classes(tmp_path / "soup.safetensors") == ["0", "1"]


def test_a_pool_of_checkpoints(tmp_path: Path) -> None:
    like = state()
    for number in range(3):
        torch.save(state(number), tmp_path / f"m{number}.pth")
    torch.save({"model": state(2)}, tmp_path / "z.pt")
    spoilt = state(4)
    spoilt["norm.bias"][0] = float("nan")
    torch.save(spoilt, tmp_path / "spoilt.pth")
    pool = CheckpointPool(str(tmp_path), like, Pool(f"memory://{tmp_path.name}"))
    assert [record.short for record in pool.ingredients()] == ["m0", "m1", "m2"]
    assert pool.copies == {"z": "m2"}
    assert "non-finite" in pool.misfits["spoilt"]
    record = pool.ingredients()[1]
    assert record.fingerprint == record.weights and record.metrics == {} and record.start is None
    with pool.store(record.fingerprint) as store:
        assert torch.equal(store.read("embed.weight"), state(1)["embed.weight"])
    pool.add_predictions(record.weights, "s" * 64, torch.ones(2, 2))
    assert torch.equal(pool.predictions(record.weights, "s" * 64), torch.ones(2, 2))
    with pytest.raises(StorageError, match="No checkpoint in"):
        pool.ingredient("0" * 64)


def test_a_pool_of_ours_opens_one_tensor_at_a_time_also_behind_a_url(tmp_path: Path) -> None:
    for url in (tmp_path / "pool", f"memory://{tmp_path.name}/pool"):
        pool = Pool(url)
        pool.add(Ingredient(fingerprint="a" * 64, determinants={}), state(3))
        with pool.store("a" * 64) as store:
            assert torch.equal(store.read("norm.weight"), state(3)["norm.weight"])
            assert torch.equal(store.load()["head.weight"], state(3)["head.weight"])
