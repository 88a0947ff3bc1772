"""Artifacts: what comes back for a task, what a file takes, tasks added and removed, and what is refused."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from soups.artifacts import PartMethod, open_artifact, pack
from soups.artifacts.method import Piece
from soups.artifacts.methods import PART_METHODS
from soups.errors import ConfigError, SoupError, StorageError, WeightsError
from soups.merging import merge
from soups.stores import open_store, write_safetensors
from soups.weights import hash_weights

SHAPES = {"embed": (50, 33), "matrix": (300, 301), "conv": (4, 3, 3, 3), "bias": (17,), "scalar": (), "empty": (0, 3)}


def model(seed, like=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    moves = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    weights = {name: (x if like is None else like[name].float() + 0.1 * x).to(dtype) for name, x in moves.items()}
    return {**weights, "head": weights["embed"], "steps": torch.tensor(7 if like is None else seed)}


BASE = model(0)
EXPERTS = {"news": model(1, BASE), "movies": model(2, BASE), "tweets": model(3, BASE)}


@pytest.fixture
def files(tmp_path):
    write_safetensors(tmp_path / "base.safetensors", BASE)
    for task, weights in EXPERTS.items():
        write_safetensors(tmp_path / f"{task}.safetensors", weights)
    return tmp_path


def bits(delta):
    """The definition, in NumPy: mean |τ| times the sign, −1 for zero."""
    tau = delta.double().numpy()
    return np.float32(np.abs(tau).mean()) * np.where(tau > 0, np.float32(1), np.float32(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_comes_back_as_signs_and_a_scale(tmp_path, dtype):
    base = model(0, dtype=dtype)
    experts = {task: model(n, base, dtype) for n, task in enumerate(EXPERTS, 1)}
    path = pack("bitdelta", experts, base=base, out=tmp_path / "a.safetensors")
    with open_artifact(path) as artifact:
        assert artifact.tasks == list(experts)
        for task, expert in experts.items():
            found = artifact.materialize(task, base=base)
            assert set(found) == set(base)
            for name in ("embed", "matrix", "conv"):
                wanted = base[name].float() + torch.from_numpy(bits(expert[name].float() - base[name].float()))
                assert found[name].dtype == dtype
                assert torch.equal(found[name], wanted.to(dtype)), name
            for name in ("bias", "scalar", "empty", "steps"):
                assert torch.equal(found[name], expert[name])
            assert found["head"] is found["embed"]


def test_the_file_has_a_bit_for_each_element_of_a_matrix(files):
    path = pack("bitdelta", EXPERTS, base=BASE, out=files / "a.safetensors")
    elements = sum(np.prod(SHAPES[name]) for name in ("embed", "matrix", "conv"))
    bytes_ = sum(-(-int(np.prod(SHAPES[name])) // 8) + 4 for name in ("embed", "matrix", "conv")) + 17 * 4 + 4 + 8
    with open_artifact(path) as artifact:
        assert [artifact.bytes_of(task) for task in artifact.tasks] == [bytes_] * 3
        assert artifact.bytes_of(None) == 0
        assert artifact.header.base.weights_hash == hash_weights(BASE)
        assert {t: o.weights_hash for t, o in artifact.header.tasks.items()} == {
            t: hash_weights(w) for t, w in EXPERTS.items()
        }
    assert bytes_ < elements / 8 + 200


def test_a_task_is_written_and_read_like_any_model(files):
    paths = {task: files / f"{task}.safetensors" for task in EXPERTS}
    path = pack("bitdelta", paths, base=files / "base.safetensors", out=files / "a.safetensors")
    with open_artifact(path) as artifact:
        wanted = artifact.materialize("movies")
        out = artifact.materialize("movies", files / "movies", budget=1, threads=2)
        with open_store(out) as store:
            found = store.load()
            assert set(found) == set(wanted)
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        # A task's model is a store: it can be merged without being written first.
        with artifact.open_task("news") as news, artifact.open_task("movies") as movies:
            both = merge("linear", [news, movies])
            assert news.identity("matrix") != movies.identity("matrix")
            assert news.identity("matrix") is not None
    with open_artifact(path) as artifact:
        mean = (artifact.materialize("news")["matrix"] + wanted["matrix"]) / 2
    assert torch.allclose(both["matrix"], mean, atol=1e-6)


def test_tasks_are_added_and_removed_to_the_byte(files):
    three = pack("bitdelta", EXPERTS, base=BASE, out=files / "three.safetensors").read_bytes()
    two = {task: EXPERTS[task] for task in ("news", "movies")}
    pack("bitdelta", two, base=BASE, out=files / "two.safetensors")
    with open_artifact(files / "two.safetensors") as artifact:
        added = artifact.add("tweets", EXPERTS["tweets"], files / "added.safetensors", base=BASE)
    assert added.read_bytes() == three
    with open_artifact(added) as artifact:
        removed = artifact.remove("tweets", files / "removed.safetensors")
        assert removed.read_bytes() == (files / "two.safetensors").read_bytes()
        middle = artifact.remove("movies", files / "middle.safetensors")
        with pytest.raises(StorageError, match="something at"):
            artifact.remove("movies", middle)
    rest = {task: EXPERTS[task] for task in ("news", "tweets")}
    assert middle.read_bytes() == pack("bitdelta", rest, base=BASE, out=files / "rest.safetensors").read_bytes()


@dataclass(frozen=True)
class Centred(PartMethod):
    """Shared: the mean task vector; a task's own: its difference from it, halved. A stranger's method, for the interface."""

    independent: ClassVar[bool] = False
    factor: float = 0.5

    def part(self, meta):
        return {"rest": meta}

    def shared(self, meta):
        return {"mean": meta}

    def encode(self, operands):
        for chunk in operands:
            deltas = [delta.clone() for delta in chunk.deltas()]
            mean = sum(deltas) / len(deltas)
            yield Piece(None, "mean", chunk.start, mean)
            for task, delta in enumerate(deltas):
                yield Piece(task, "rest", chunk.start, (delta - mean) * self.factor)

    def decode(self, shared, own, meta, start, stop):
        return shared.read("mean", start, stop) + own.read("rest", start, stop) / self.factor


def test_a_method_may_share_what_it_finds_in_all_tasks(files, monkeypatch):
    monkeypatch.setitem(PART_METHODS, "centred", Centred)
    path = pack("centred", EXPERTS, base=BASE, out=files / "c.safetensors", factor=0.25)
    with open_artifact(path) as artifact:
        assert artifact.header.parameters == {"factor": 0.25}
        assert artifact.bytes_of(None) == 4 * sum(int(np.prod(s)) for s in SHAPES.values())
        for task, expert in EXPERTS.items():
            found = artifact.materialize(task, base=BASE)
            for name in SHAPES:
                torch.testing.assert_close(found[name], expert[name], rtol=1e-5, atol=1e-6)
        with pytest.raises(ConfigError, match="depends on all tasks, so removing one needs the experts again"):
            artifact.remove("news", files / "x.safetensors")
        with pytest.raises(ConfigError, match="so adding one needs"):
            artifact.add("more", EXPERTS["news"], files / "x.safetensors", base=BASE)


def test_what_does_not_fit_is_refused_in_words(files):
    out = files / "a.safetensors"
    pack("bitdelta", EXPERTS, base=BASE, out=out)

    def refused(message, call, kind=SoupError):
        with pytest.raises(kind, match=message):
            call()

    refused(
        "no method with parts 'bitdetla'; .*bitdelta", lambda: pack("bitdetla", EXPERTS, base=BASE, out=files / "b")
    )
    refused("no parameter 'scale'", lambda: pack("bitdelta", EXPERTS, base=BASE, out=files / "b", scale=2))
    refused("at least one task", lambda: pack("bitdelta", {}, base=BASE, out=files / "b"))
    refused("'a/b' is empty or holds a slash", lambda: pack("bitdelta", {"a/b": BASE}, base=BASE, out=files / "b"))
    other = {**BASE, "bias": torch.zeros(18)}
    refused(
        r"\(news\) does not fit the base model .*'bias'",
        lambda: pack("bitdelta", {"news": other}, base=BASE, out=files / "b"),
    )
    refused("something at", lambda: pack("bitdelta", EXPERTS, base=BASE, out=out), StorageError)
    assert not (files / "b").exists()
    refused("is no artifact", lambda: open_artifact(files / "base.safetensors"), WeightsError)
    with open_artifact(out) as artifact:
        refused("no task 'new'; .*news", lambda: artifact.materialize("new", base=BASE))
        refused("is not the base model of", lambda: artifact.materialize("news", base=EXPERTS["news"]), WeightsError)
        refused("a task 'news' already", lambda: artifact.add("news", EXPERTS["news"], files / "b", base=BASE))
    cut = files / "cut.safetensors"
    cut.write_bytes(out.read_bytes()[:-100])
    refused("cut.safetensors", lambda: open_artifact(cut), StorageError)
    write_safetensors(
        files / "d.safetensors",
        {"w": torch.ones(1)},
        {"format": "soups.artifact/1", "soups.artifact": json.dumps({"method": "bitdelta"})},
    )
    refused("header of this artifact is damaged", lambda: open_artifact(files / "d.safetensors"), WeightsError)
