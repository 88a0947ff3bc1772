import collections
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import DataError, SoupError, StorageError
from soups.stores import open_store

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def equal(store, weights):
    loaded = store.load()
    assert list(loaded) == list(weights)
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt", ""])
def test_reads_a_state_dict(tmp_path, ending):
    torch.save(MODEL.state_dict(), tmp_path / f"w{ending}")
    with open_store(tmp_path / f"w{ending}") as store:
        equal(store, MODEL.state_dict())
        assert torch.equal(store.read("0.weight", slice(1, 3)), MODEL[0].weight[1:3])


def test_every_dtype_strides_ties_and_parameters(tmp_path):
    base = torch.randn(6, 5)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.bool]
    weights = {str(dtype): (base * 3).to(dtype) for dtype in [*dtypes, torch.float8_e4m3fn, torch.complex64]}
    weights |= {"t": base.T, "part": base[2:4, 1:3], "same": base, "again": base, "empty": torch.zeros(0, 2)}
    weights |= {"parameter": torch.nn.Parameter(torch.ones(2)), "expanded": torch.ones(1, 3).expand(4, 3)}
    torch.save(weights, tmp_path / "w.pt")
    with open_store(tmp_path / "w.pt") as store:
        assert store.tied() == {"again": "same"}
        loaded = store.load()
        for name, tensor in weights.items():
            assert torch.equal(loaded[name].double(), tensor.double()), name
        assert torch.equal(store.read_flat("t", 3, 9), base.T.reshape(-1)[3:9])


def test_a_lightning_checkpoint_with_averages(tmp_path):
    live = {f"model._orig_mod.{k}": v for k, v in MODEL.state_dict().items()}
    ema = {k.replace("_orig_mod.", ""): v + 1 for k, v in live.items() if v.is_floating_point()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    content = {"epoch": 3, "state_dict": live, "optimizer_states": [optimizer], "hyper_parameters": {"lr": 0.1}}
    torch.save({**content, "weight_averages": {"averages": {"ema": {"weights": ema, "count": 3}}}}, tmp_path / "a.ckpt")
    with open_store(tmp_path / "a.ckpt", prefix="model.") as store:
        equal(store, MODEL.state_dict())
    for state in ("average", "average:ema"):
        with open_store(tmp_path / "a.ckpt", state=state, prefix="model.") as store:
            assert torch.equal(store.read("0.bias"), MODEL[0].bias + 1)
            assert store.read("1.num_batches_tracked") == 0  # completed from the model's own
    with pytest.raises(DataError, match="no average called 'swa'"):
        open_store(tmp_path / "a.ckpt", state="average:swa")
    with pytest.raises(StorageError, match=r"Allowed: 'state_dict'"):
        open_store(tmp_path / "a.ckpt", state="stat_dict")


def test_our_callbacks_layout(tmp_path):
    embed = torch.zeros(2, 2)
    live = {"embed": embed, "head": embed, "steps": torch.tensor(3)}
    averages = {
        "ema0.9": {"kind": "EMA", "weights": {"embed": embed + 1}, "state": {"sum": torch.zeros(4)}},
        "swa": {"kind": "SWA", "weights": {"embed": embed + 2}, "state": {}},
    }
    kept = {"version": 1, "tied": {"head": "embed"}, "averages": averages}
    torch.save({"state_dict": live, "weight_averages": kept}, tmp_path / "a.ckpt")
    for name, value in (("ema0.9", 1), ("swa", 2)):
        with open_store(tmp_path / "a.ckpt", state=f"average:{name}") as store:
            assert store.tied() == {"head": "embed"} and store.read("steps") == 3
            assert store.read("head").unique().tolist() == [value]
    with pytest.raises(DataError, match="several averages"):
        open_store(tmp_path / "a.ckpt", state="average")


def test_lightnings_own_weight_averaging(tmp_path):
    average, live = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    torch.save({"state_dict": average, "current_model_state": live}, tmp_path / "a.ckpt")
    for state, expected in ((None, 1), ("average", 1), ("raw", 0)):
        with open_store(tmp_path / "a.ckpt", state=state) as store:
            assert store.read("w").tolist() == [expected] * 2


def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path):
    target = tmp_path / "owned"
    for content in ({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": Payload(target)}, Payload(target)):
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(StorageError, match=r"asks to run (posix|nt)\.system"):
            open_store(tmp_path / "bad.ckpt")
    assert not target.exists()


class Foreign(collections.OrderedDict):
    pass


class ForeignTensor:
    def __reduce__(self):
        return Foreign, ()


def test_foreign_objects_beside_the_weights_are_left_alone(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": Foreign(a=1)}, tmp_path / "a.ckpt")
    with open_store(tmp_path / "a.ckpt") as store:
        assert store.read("w").tolist() == [1, 1]


def test_foreign_objects_among_the_weights_are_an_error(tmp_path):
    torch.save({"w": torch.ones(2), "v": ForeignTensor()}, tmp_path / "a.pt")
    with pytest.raises(StorageError, match="'v' among the model's weights is no plain tensor"):
        open_store(tmp_path / "a.pt")
    torch.save(Foreign(w=torch.ones(2)), tmp_path / "a.pt")
    with pytest.raises(StorageError, match="not loaded"):
        open_store(tmp_path / "a.pt")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(StorageError, match=r"is a plain Python pickle, not a file of torch\.save"):
        open_store(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
    with pytest.raises(StorageError, match="compressed"):
        open_store(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", b"x")
    with pytest.raises(StorageError, match=r"0 entries called data\.pkl"):
        open_store(path)


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path):
    torch.save({"w": torch.arange(8.0)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    # The shape (8,) is pickled as K\x08\x85; one more element than the storage has.
    assert data.count(b"K\x08\x85") == 1
    (tmp_path / "b.pt").write_bytes(data.replace(b"K\x08\x85", b"K\x09\x85"))
    with pytest.raises(StorageError):
        open_store(tmp_path / "b.pt")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 100_000), value=st.binary(min_size=1, max_size=4), cut=st.integers(0, 3))
def test_mutated_files_give_an_error_or_tensors(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.mktemp("fuzz") / "w.pt"
    torch.save({"state_dict": MODEL.state_dict(), "epoch": 1}, path)
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    path.write_bytes(bytes(data[: len(data) - place] if cut == 0 else data))
    try:
        with open_store(path) as store:
            store.load()
    except SoupError:
        pass


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_pickles_give_an_error_or_tensors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "w.pt"
    torch.save({"state_dict": MODEL.state_dict(), "epoch": 1}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    pickled = bytearray(entries[name])
    for _ in range(data.draw(st.integers(1, 3))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in {**entries, name: bytes(pickled)}.items():
            archive.writestr(entry, content)
    try:
        with open_store(path) as store:
            store.load()
    except SoupError:
        pass


def test_a_torchscript_program_is_called_one(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(StorageError, match=r"TorchScript program .*save `module.state_dict\(\)` instead"):
        open_store(tmp_path / "m.pt")
