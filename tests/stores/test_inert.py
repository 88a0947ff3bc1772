"""Pickles run nothing: ordinary objects are skipped with a note, attacks are refused by name, old and odd tensors are read."""

import argparse
import builtins
import collections
import functools
import os
import pickle
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from soups.averaging import averages, export, load_averaged
from soups.errors import SoupError, StorageError
from soups.stores import TorchStore, open_store, read_safetensors
from soups.stores.pool import Pool
from soups.stores.pool_of_checkpoints import CheckpointPool

WEIGHTS = {"net.weight": torch.arange(6.0).reshape(2, 3), "net.bias": torch.tensor([1.0, -1.0])}


class Config:
    """A class of somebody's own."""

    def __init__(self) -> None:
        self.depth = 3

    def method(self) -> int:
        return self.depth


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a: int) -> None:
        self.a = a


HYPERPARAMETERS: dict[str, Any] = {
    "DictConfig": OmegaConf.create({"lr": 0.1, "layers": [1, 2], "path": "${lr}"}),
    "functools.partial": functools.partial(torch.optim.AdamW, lr=0.1),
    "Path": Path("/data/train"),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "numpy generator": np.random.default_rng(0),
    "range": range(3),
    "class": nn.Linear,
    "builtin class": dict,
    "function": torch.relu,
    "module": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    "own object": Config(),
    "bound method": Config().method,
    "slots": Slotted(3),
    "Namespace": argparse.Namespace(lr=0.1),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "bytes": b"\xff\x00",
    "complex": 1j,
    "slice": slice(1, 3),
    "date": __import__("datetime").datetime(2024, 1, 1),
    "uuid": __import__("uuid").UUID(int=5),
    "Decimal": __import__("decimal").Decimal("0.1"),
    "enum": __import__("logging").Logger,
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "generator": torch.Generator().get_state(),
    "exception": ValueError("x"),
}


@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_hyperparameters_of_any_kind_do_not_hide_the_weights(kind: str, tmp_path: Path) -> None:
    """As every command reads them; what is plain is kept, what is not is noted."""
    average = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in WEIGHTS.items()},
        "hyper_parameters": {"lr": 0.1, "odd": HYPERPARAMETERS[kind]},
        "weight_averages": {
            "averages": {"ema": {"kind": "EMA", "count": 3, "weights": {f"model.{k}": v for k, v in average.items()}}}
        },
        "global_step": 7,
    }
    path = tmp_path / "run" / "last.ckpt"
    path.parent.mkdir()
    torch.save(content, path)
    with open_store(path, prefix="model.") as store:
        assert all(torch.equal(store.read(name), tensor) for name, tensor in WEIGHTS.items())
    loaded = load_averaged(path)
    assert torch.equal(loaded["model.net.bias"], WEIGHTS["net.bias"] + 1)
    assert [(row.name, row.count) for row in averages(path)] == [("raw", 7), ("ema", 3)]
    export(path, "ema", tmp_path / "out.safetensors")
    assert torch.equal(read_safetensors(tmp_path / "out.safetensors")["model.net.weight"], average["net.weight"])
    export(path, "ema", tmp_path / "out.ckpt")
    kept = torch.load(tmp_path / "out.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["lr"] == 0.1, "plain values beside one that is not are kept"
    pool = CheckpointPool(str(path.parent), WEIGHTS, Pool(tmp_path / "cache"))
    assert [record.short for record in pool.ingredients()] == ["last"] and pool.misfits == {}
    with TorchStore(path) as store:
        skipped = store.skipped
    if kind in ("set", "frozenset", "bytes", "complex", "dtype", "generator", "defaultdict", "Counter", "slice"):
        assert skipped == {}
    elif kind != "builtin class":
        assert any(place.startswith("hyper_parameters.odd") for place in skipped), skipped


def test_a_whole_configuration_as_hyperparameters(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "hyper_parameters": HYPERPARAMETERS["DictConfig"]}, tmp_path / "a.ckpt")
    with TorchStore(tmp_path / "a.ckpt") as store:
        assert store.skipped == {"hyper_parameters": "omegaconf.dictconfig.DictConfig"}
        assert set(store.keys()) == set(WEIGHTS)


class Calls:
    """Unpickles as a call of a function by name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def raw_pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function which need not exist here."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


ATTACKS = {
    "os.system": (os.system, "touch owned"),
    "subprocess.Popen": (subprocess.Popen, ["touch", "owned"]),
    "subprocess.check_output": (subprocess.check_output, ["touch", "owned"]),
    "builtins.exec": (exec, "open('owned', 'w')"),
    "builtins.eval": (eval, "open('owned', 'w')"),
    "builtins.open": (open, "owned", "w"),
    "builtins.__import__": (builtins.__import__, "os"),
    "importlib.import_module": (__import__("importlib").import_module, "os"),
    "runpy._run_code": (__import__("runpy")._run_code, "open('owned', 'w')", {}),
    "shutil.rmtree": (__import__("shutil").rmtree, "owned"),
    "getattr": (getattr, Config(), "__globals__"),
}


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("where", ["hyperparameters", "weights", "root"])
def test_attacks_are_refused_by_name_and_nothing_runs(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    payload = Calls(*ATTACKS[kind])
    content: Any = {"state_dict": dict(WEIGHTS), "hyper_parameters": {"lr": 0.1}}
    if where == "hyperparameters":
        content["hyper_parameters"]["x"] = payload
    elif where == "weights":
        content["state_dict"]["x"] = payload
    else:
        content = payload
    torch.save(content, tmp_path / "bad.ckpt")
    name = kind.replace("os.system", "(posix|nt).system").replace("builtins.", r"(__builtin__|builtins|_?io)\.")
    for read in (open_store, load_averaged, averages):
        with pytest.raises(StorageError, match=rf"asks to run .*{name}.*refused and nothing was run"):
            read(tmp_path / "bad.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("module", "name"), [("os", "popen"), ("nt", "system"), ("pty", "spawn"), ("commands", "getoutput"),
                                          ("webbrowser", "open"), ("ctypes", "CDLL"), ("torch", "load"), ("pip", "main"),
                                          ("types", "FunctionType"), ("code", "interact"), ("socket", "socket")])  # fmt: skip
def test_attacks_by_names_that_need_not_exist_here(module: str, name: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", raw_pickle(module, name, "x"))
        archive.writestr("archive/version", "3")
    with pytest.raises(StorageError, match=rf"asks to run {module.replace('commands', 'subprocess')}\.{name}"):
        open_store(tmp_path / "a.pt")


@pytest.mark.parametrize("module", ["code.models", "profile", "trace.net", "commands.train", "platforms", "ossaudio"])
def test_peoples_own_packages_are_no_attack(module: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", raw_pickle(module, "Net", "x"))
    with pytest.raises(StorageError, match=rf"not loaded.*{module}\.Net"):
        open_store(tmp_path / "a.pt")


# Torch files ---------------------------------------------------------------------------------------------------------


class Tagged(nn.Parameter):
    """A parameter of a class of its own, with an attribute."""


def odd_tensors() -> dict[str, torch.Tensor]:
    def z() -> torch.Tensor:
        return torch.view_as_complex(torch.arange(12.0).reshape(3, 2, 2))

    tagged = Tagged(torch.arange(4.0))
    tagged.note = "mine"
    noted = torch.arange(3.0)
    noted.note = "mine"
    return {
        "plain": torch.arange(5.0),
        "conjugate": z().conj(),
        "conjugate part": z().conj()[1:, 1],
        "negative": z().conj().imag,
        "both": torch.view_as_complex(torch.arange(4.0).reshape(2, 2)).conj().imag[1:],
        "transposed": z().mH,
        "parameter": nn.Parameter(torch.ones(2)),
        "parameter of a class": tagged,
        "tensor with a note": noted,
        "strided": torch.arange(10.0)[::3],
        "expanded": torch.ones(1).expand(4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.arange(3).half(),
        "bfloat16": torch.arange(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "long": torch.arange(3),
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
def test_every_tensor_comes_back_with_its_values(new: bool, tmp_path: Path) -> None:
    tensors = odd_tensors()
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    expected = torch.load(tmp_path / "a.pt", weights_only=False)
    with open_store(tmp_path / "a.pt") as store:
        assert set(store.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read, flat = store.read(name), tensor.detach().resolve_conj().resolve_neg().reshape(-1)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read, tensor.detach()) and torch.equal(read, expected[name].detach()), name
            stop = min(3, flat.numel())
            assert torch.equal(store.read_flat(name, min(1, stop), stop), flat[min(1, stop) : stop]), name
            row = store.file_row(name, 0)
            if row is not None:
                assert torch.equal(row.source.read_tensor(row.offset, row.dtype, flat.numel()), flat), name


@pytest.mark.parametrize("new", [True, False])
def test_signs_survive_a_merge(new: bool, tmp_path: Path) -> None:
    from soups.merging import merge

    z = torch.view_as_complex(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    for number in range(2):
        weights = {"w": (z + number).conj().imag, "v": z.real.clone()}
        torch.save(weights, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=new)
    for compiled in (False, None):
        merged = merge("linear", [tmp_path / "0.pt", tmp_path / "1.pt"], compiled=compiled)
        assert torch.equal(merged["w"], -z.imag) and torch.equal(merged["v"], z.real)


def test_ties_views_and_nested_states_of_old_files(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    content = {"state_dict": {"a": both, "b": both, "part": both[2:]}, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with open_store(tmp_path / "old.pth") as store:
        assert store.tied() == {"b": "a"} and torch.equal(store.read("part"), both[2:])
    data = (tmp_path / "old.pth").read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 40, 16):
        (tmp_path / "cut.pth").write_bytes(data[:keep])
        with pytest.raises(SoupError):
            open_store(tmp_path / "cut.pth")


@pytest.mark.parametrize("new", [True, False])
def test_pickled_modules_are_named_with_the_way_out(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, place in (({"model": nn.Linear(2, 2)}, r"model"), (nn.Linear(2, 2), "the whole file")):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        for read in (open_store, load_averaged):
            with pytest.raises(
                SoupError, match=rf"pickled modules?: {place} \(torch\.nn\.modules\.linear\.Linear\).*state_dict\(\)"
            ):
                read(path, "raw") if read is load_averaged else read(path)
    torch.save({"model": nn.Linear(2, 2), "state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=new)
    with TorchStore(path) as store:
        assert set(store.keys()) == set(WEIGHTS) and store.skipped == {"model": "torch.nn.modules.linear.Linear"}


def test_extra_state_that_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "net._extra_state": Config()}, tmp_path / "a.pt")
    with TorchStore(tmp_path / "a.pt") as store:
        assert set(store.keys()) == set(WEIGHTS)
        assert store.skipped == {"net._extra_state": "tests.stores.test_inert.Config"}


def test_quantised_and_sparse_tensors_are_named(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    for odd in (quantised, torch.eye(2).to_sparse()):
        torch.save({"w": torch.ones(2), "odd": odd}, tmp_path / "a.pt")
        with pytest.raises(StorageError, match="'odd' among the model's weights is no plain tensor"):
            open_store(tmp_path / "a.pt")


def test_a_plain_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": 1}, protocol=4))
    with pytest.raises(StorageError, match=r"plain Python pickle, not a file of torch\.save"):
        open_store(tmp_path / "a.pt")
