import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from soups.errors import SoupError, StorageError
from soups.stores import SafetensorsStore, open_store, read_safetensors, write_safetensors

WEIGHTS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False, True]),
}


@pytest.fixture
def file(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tmp_path / "w.safetensors"


def same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        assert torch.equal(left[name], right[name])


def test_reads_what_the_library_wrote(file):
    with open_store(file) as store:
        same(store.load(), WEIGHTS)
        assert store.metadata == {"format": "pt"}
        assert store.meta("b") == ((5,), torch.bfloat16)
        assert torch.equal(store.read("a", slice(1, 3)), WEIGHTS["a"][1:3])
        assert torch.equal(store.read("a", slice(-1, None)), WEIGHTS["a"][-1:])
        assert torch.equal(store.read("a", slice(0, 4, 2)), WEIGHTS["a"][::2])
        assert torch.equal(store.read_flat("a", 5, 9), torch.arange(5.0, 9.0))


def test_writes_what_the_library_reads(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", WEIGHTS, {"note": "x"})
    same(load_file(tmp_path / "w.safetensors"), WEIGHTS)
    assert read_safetensors(tmp_path / "w.safetensors")["c"] == 3


def test_tied_and_strided_weights(tmp_path):
    w = torch.randn(4, 4)
    write_safetensors(tmp_path / "w.safetensors", {"x": w, "y": w, "t": w.T, "part": w[1:3]})
    back = read_safetensors(tmp_path / "w.safetensors")
    assert back["x"].data_ptr() == back["y"].data_ptr()
    assert torch.equal(back["t"], w.T) and torch.equal(back["part"], w[1:3])
    with SafetensorsStore(tmp_path / "w.safetensors") as store:
        assert store.tied() == {"y": "x"}
        assert torch.equal(store.read("y", slice(0, 2)), w[:2])


def test_reading_into_a_buffer_reuses_its_memory(file):
    buffer = torch.empty(100)
    with open_store(file) as store:
        part = store.read_flat("a", 2, 8, out=buffer)
        assert part.data_ptr() == buffer.data_ptr() and part.tolist() == [2, 3, 4, 5, 6, 7]
        assert store.read_flat("b", out=buffer).dtype == torch.bfloat16


def test_unknown_tensor_is_named(file):
    with open_store(file) as store, pytest.raises(SoupError, match="'aa'"):
        store.read("aa")


def rewritten(file, change):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[4, 7]), "needs 112 bytes"),
        (lambda h: h["a"].update(shape=[-4, -6]), "shape"),
        (lambda h: h["a"].update(data_offsets=[0, 10**12]), "span"),
        (lambda h: h["a"].update(dtype="F4"), "needs 12 bytes"),
        (lambda h: h["a"].pop("shape"), "lacks a dtype"),
        (lambda h: h.update(b=h["a"]), "where"),
        (lambda h: h.update({"__metadata__": {"x": 1}}), "metadata"),
        (lambda h: h.update({"__metadata__": {"soups.tied": '{"z": "nowhere"}'}}), "tied"),
    ],
)
def test_a_false_header_is_refused(file, change, message):
    rewritten(file, change)
    with pytest.raises(StorageError, match=message):
        open_store(file)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(StorageError, match="occurs twice"):
        open_store(tmp_path / "w.safetensors")


def test_a_file_cut_short_while_open_is_an_error_and_not_a_crash(file):
    with open_store(file) as store:
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size - 60)
        with pytest.raises(StorageError, match="cut off"):
            store.load()


def test_every_truncation_is_noticed(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(StorageError):
            open_store(file)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), more=st.binary(max_size=8))
def test_mutated_files_give_an_error_or_tensors(tmp_path_factory, place, value, more):
    file = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    save_file(WEIGHTS, file)
    data = bytearray(file.read_bytes())
    data[place % len(data)] = value
    file.write_bytes(bytes(data) + more)
    try:
        with open_store(file) as store:
            store.load()
    except SoupError:
        pass


def test_url(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.arange(6.0)})
    system.pipe("/soups-test/w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    with open_store("memory://soups-test/w.safetensors") as store:
        assert store.read_flat("a", 2, 4).tolist() == [2, 3]
    with pytest.raises(StorageError, match="no file"):
        open_store("memory://soups-test/nothing.safetensors")
    with pytest.raises(StorageError, match="protocol"):
        open_store("nosuchprotocol://x/w.safetensors")
