"""The laws of weight space, for every row of `settings.py`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from soups.merging import METHODS, make_method, merge
from soups.merging.sums import BLOCK
from soups.stores import open_store, write_safetensors

HERE = Path(__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"merging_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ROWS = load("settings").ROWS
models = load("models")
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}{row.parameters or ''}")


def run(row, base, experts, *, weights=None, **options):
    """Merge; `weights` are the experts' weights, where those are given as files."""
    method = make_method(row.name, **row.parameters)
    if row.statistics:
        options["statistics"] = [models.statistics(row.statistics, one) for one in weights or experts]
    return merge(method, experts, base=base if row.base else None, **options)


def close(left, right, tolerance=2e-5):
    for name in left:
        scale = float(right[name].float().abs().max()) + 1e-12
        assert torch.allclose(left[name].float(), right[name].float(), rtol=0, atol=tolerance * scale), name


def same_bits(left, right):
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def test_every_method_has_a_row():
    assert {row.name for row in ROWS} == set(METHODS)


@every
def test_copies_of_the_base_merge_to_it(row):
    base = models.model(0)
    merged = run(row, base, [dict(base) for _ in range(row.models)])
    factor = row.parameters.get("scale", 1) if row.name == "passthrough" else 1
    if row.parameters.get("normalize") is False and row.name == "linear":
        factor = sum(row.parameters["weight"])
    close(merged, {name: (t * factor if t.is_floating_point() else t) for name, t in base.items()}, 1e-6)


@every
def test_copies_of_one_model_merge_to_it(row):
    if not row.returns_common:
        pytest.skip("not claimed")
    base, (expert,) = models.family(1)
    merged = run(row, base, [dict(expert) for _ in range(row.models)])
    close(merged, {**expert, "steps": base["steps"] if row.base else expert["steps"]}, 1e-5)


@every
def test_order_does_not_matter(row):
    if not row.any_order or row.models == 1:
        pytest.skip("not claimed")
    base, experts = models.family(row.models)
    merged, turned = run(row, base, experts), run(row, base, experts[1:] + experts[:1])
    turned["steps"] = merged["steps"]
    close(merged, turned)


@every
def test_scaling_all_models_scales_the_result(row):
    if not row.scales:
        pytest.skip("not claimed")
    base, experts = models.family(row.models)

    def scaled(weights):
        larger = {name: 4 * tensor if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        return {**larger, "head.weight": larger["embed.weight"]}

    close(run(row, scaled(base), [scaled(expert) for expert in experts]), scaled(run(row, base, experts)))


@every
def test_inputs_are_untouched_and_ties_and_counters_are_kept(row):
    base, experts = models.family(row.models)
    before = [{name: tensor.clone() for name, tensor in weights.items()} for weights in (base, *experts)]
    merged = run(row, base, experts)
    for weights, copy in zip((base, *experts), before, strict=True):
        same_bits(weights, copy)
    assert merged["head.weight"] is merged["embed.weight"]
    assert merged["steps"] == (base if row.base else experts[0])["steps"]
    assert list(merged) and {name: tensor.shape for name, tensor in merged.items()} == {
        n: t.shape for n, t in base.items()
    }
    assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())


@every
def test_dtypes_are_kept_or_converted_with_one_rounding(row):
    base, experts = models.family(row.models, torch.bfloat16)
    merged = run(row, base, experts)
    assert {tensor.dtype for name, tensor in merged.items() if name != "steps"} == {torch.bfloat16}
    precise = run(row, base, experts, dtype=torch.float32)
    for name in models.SHAPES:
        assert torch.equal(precise[name].to(torch.bfloat16), merged[name])


@every
def test_streamed_equals_in_memory_bit_for_bit(row, tmp_path):
    base, experts = models.family(row.models)
    whole = run(row, base, experts, budget=1 << 40, threads=1)
    streamed = run(row, base, experts, budget=1, threads=3)
    same_bits(streamed, whole)
    paths = []
    for number, weights in enumerate((base, *experts)):
        paths.append(tmp_path / f"{number}{'.safetensors' if number % 2 else '.pt'}")
        if number % 2:
            write_safetensors(paths[-1], weights)
        else:
            torch.save(weights, paths[-1])
    run(row, paths[0], paths[1:], weights=experts, out=tmp_path / "out", shard_bytes=150_000, budget=1, threads=2)
    with open_store(tmp_path / "out") as store:
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        loaded = store.load()
        same_bits({name: loaded[name] for name in whole}, whole)


@every
def test_the_seed_decides(row):
    base, experts = models.family(row.models)
    if not row.random:
        assert "seed" not in METHODS[row.name].parameters
        return
    merged = run(row, base, experts)
    same_bits(merged, run(row, base, experts))
    method = make_method(row.name, **{**row.parameters, "seed": 1234})
    assert not torch.equal(merge(method, experts, base=base)["matrix"], merged["matrix"])


def test_chunks_are_cut_where_the_tests_believe():
    assert models.SHAPES["long"][0] > 3 * BLOCK and 2 * BLOCK < 70 * 501


def test_a_folder_says_how_it_was_made(tmp_path):
    base, experts = models.family(2)
    merge("ties", experts, base=base, out=tmp_path / "out.safetensors")
    with open_store(tmp_path / "out.safetensors") as store:
        assert "Trim" in json.loads(store.metadata["soups.merge"])["method"] or "ties" in store.metadata["soups.merge"]
