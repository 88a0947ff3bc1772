"""The engine's promises that are not about any one method: errors, interruption, memory, devices."""

import threading

import pytest
import torch

from soups.errors import ConfigError, StorageError, WeightsError
from soups.merging import make_method, merge
from soups.merging.job import Job
from soups.merging.method import Method
from soups.merging.operands import Source
from soups.merging.stream import MemorySink, run
from soups.stores import DictStore, TensorMeta, open_store, write_safetensors

A = {"w": torch.arange(40_000.0), "n": torch.tensor(3)}
B = {"w": torch.arange(40_000.0) + 2, "n": torch.tensor(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("n"), r"1 missing \('n'\)"),
        (lambda w: w.update(extra=torch.ones(1)), r"1 unexpected \('extra'\)"),
        (lambda w: w.update(w=torch.ones(7)), r"mis-shaped \('w': expected \(40000,\), found \(7,\)\)"),
        (lambda w: w.update(n=torch.tensor(1.0)), "of another kind"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_work(tmp_path, change, message):
    other = dict(B)
    change(other)
    with pytest.raises(WeightsError, match=message):
        merge("linear", [A, other], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_named(tmp_path, bad):
    spoilt = {**B, "w": B["w"].clone()}
    spoilt["w"][30_000] = bad
    write_safetensors(tmp_path / "spoilt.safetensors", spoilt)
    with pytest.raises(WeightsError, match=r"spoilt\.safetensors: tensor 'w' holds non-finite values"):
        merge("linear", [A, tmp_path / "spoilt.safetensors"], out=tmp_path / "out.safetensors", budget=1)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt.safetensors"]


def test_results_that_a_dtype_cannot_hold_are_an_error():
    big = {"w": torch.full((10,), 60_000.0, dtype=torch.float16)}
    with pytest.raises(WeightsError, match=r"'w' of the result does not fit into torch\.float16"):
        merge(make_method("linear", normalize=False), [big, big])


def test_sums_that_overflow_are_no_reason_to_complain():
    big = {"w": torch.full((100,), 3e38)}
    assert merge("linear", [big])["w"][0] == big["w"][0]


@pytest.mark.parametrize(
    ("name", "models", "base", "message"),
    [
        ("ties", 2, False, "needs a base model"),
        ("slerp", 2, True, "exactly 1 models"),
        ("nuslerp", 3, False, "exactly 2 models"),
        ("model_stock", 1, True, "at least 2"),
        ("tise", 1, True, "did you mean 'ties'"),
    ],
)
def test_methods_say_what_they_need(name, models, base, message):
    with pytest.raises(ConfigError, match=message):
        merge(name, [A] * models, base=A if base else None)


def test_parameters_say_what_they_allow():
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        make_method("ties", densty=0.2)
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        merge(make_method("ties", density=20), [A], base=B)
    with pytest.raises(ConfigError, match="3 values for 2 models"):
        merge(make_method("linear", weight=[1, 2, 3]), [A, B])
    with pytest.raises(ConfigError, match="probabilities outside"):
        merge(make_method("della", density=0.9), [A], base=B)


def test_methods_by_pattern():
    models = [{"x.w": torch.tensor([float(i)]), "y.w": torch.tensor([float(i)]), "z": torch.ones(1)} for i in (1, 2, 6)]
    result = merge({"x.*": "linear", "y.*": "median"}, models)
    assert isinstance(result, dict)
    assert (result["x.w"], result["y.w"], result["z"]) == (3, 2, 1)
    with pytest.raises(ConfigError, match="'q' matches no tensor"):
        merge({"*": "linear", "q": "median"}, models)


def test_an_output_is_never_an_input(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", A)
    for out in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(StorageError, match="in one place"):
            merge("linear", [tmp_path / "a.safetensors", B], out=out, overwrite=True)
    with open_store(tmp_path / "a.safetensors") as store:
        assert torch.equal(store.read("w"), A["w"])


class Interrupting(Method):
    def combine(self, chunk, seen):
        if chunk.start:
            raise KeyboardInterrupt
        return chunk.models[0]


def test_an_interruption_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        merge(Interrupting(), [A], out=tmp_path / "out", budget=1)
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("soups-merge")]


class Sizes(Method):
    def __init__(self):
        self.largest = 0

    def combine(self, chunk, seen):
        self.largest = max(self.largest, chunk.models[0].numel())
        return chunk.models[0]


def test_the_budget_bounds_the_chunks():
    store = DictStore({"w": torch.zeros(900_000)})
    plan = {"w": TensorMeta((900_000,), torch.float32)}
    for budget, expected in ((1, 16_384), (2 * 4 * 12 * 35_000, 32_768), (1 << 40, 524_288)):
        method = Sizes()
        run([Job("w", plan["w"], method, (Source(store, "w"),) * 3)], MemorySink(plan), budget=budget, threads=2)
        assert method.largest == expected


def test_progress_counts_every_byte():
    counted = []
    merge("linear", [A, B], progress=counted.append, budget=1)
    assert sum(counted) == pytest.approx(2 * A["w"].nbytes + 8, abs=10)


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    merge("linear", [A, B], threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match="Cannot compute on device"):
        merge("linear", [A, B], device=device)


def test_carried_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", A)
    for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt"):
        (folder / name).write_text(name)
    merge("linear", [folder, B], out=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in folder.iterdir()}
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"
