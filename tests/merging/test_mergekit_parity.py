"""Element by element against mergekit itself, where it is installed: `pip install mergekit==0.1.5`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from soups.merging.mergekit import merge_configuration
from soups.stores import open_store

mergekit_config = pytest.importorskip("mergekit.config")
mergekit_merge = pytest.importorskip("mergekit.merge")
mergekit_options = pytest.importorskip("mergekit.options")
tokenizers = pytest.importorskip("tokenizers")

spec = importlib.util.spec_from_file_location("merging_llama", Path(__file__).parent / "llama.py")
llama = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = llama
spec.loader.exec_module(llama)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    llama.write_family(root / "f32")
    llama.write_family(root / "bf16", torch.bfloat16)
    return root


def both(root, tmp_path, text, kind="f32"):
    text = text.replace("ROOT", str(root / kind))
    options = mergekit_options.MergeOptions(quiet=True, random_seed=0)
    mergekit_config_ = mergekit_config.MergeConfiguration.model_validate(yaml.safe_load(text))
    mergekit_merge.run_merge(mergekit_config_, str(tmp_path / "theirs"), options)
    merge_configuration(text, tmp_path / "ours")
    with open_store(tmp_path / "ours") as ours, open_store(tmp_path / "theirs") as theirs:
        return ours.load(), theirs.load()


def check(ours, theirs, tolerance=2e-6):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        difference = (ours[name].double() - tensor.double()).abs().max()
        assert difference <= tolerance * max(1.0, float(tensor.abs().max())), (name, float(difference))


def models(own="{}", count=3, base=True, **lines):
    listed = "".join(f"  - model: ROOT/m{i}\n    parameters: {own}\n" for i in range(1, count + 1))
    text = f"models:\n{listed}" + ("base_model: ROOT/base\n" if base else "")
    return text + "".join(f"{key}: {value}\n" for key, value in ({"dtype": "float32"} | lines).items())


CASES = {
    "linear": models("{weight: 0.4}", base=False, merge_method="linear"),
    "linear plain": models("{weight: 0.4}", base=False, merge_method="linear", parameters="{normalize: false}"),
    "passthrough": models("{scale: 0.5}", 1, base=False, merge_method="passthrough"),
    "slerp": models("{}", 1, merge_method="slerp", parameters="{t: 0.3}"),
    "slerp gradient": models("{}", 1, merge_method="slerp", parameters="{t: [0, 0.5, 0.3, 0.7, 1]}"),
    "slerp filters": models(
        "{}",
        1,
        merge_method="slerp",
        parameters="{t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]}",
    ),
    "nuslerp": models("{weight: [0.2, 0.7]}", 2, merge_method="nuslerp"),
    "nuslerp no base": models("{weight: 0.5}", 2, base=False, merge_method="nuslerp"),
    "nuslerp rows": models("{weight: 0.5}", 2, merge_method="nuslerp", parameters="{nuslerp_flatten: false}"),
    "nuslerp columns": models(
        "{weight: 0.5}", 2, merge_method="nuslerp", parameters="{nuslerp_flatten: false, nuslerp_row_wise: true}"
    ),
    "multislerp": models("{weight: 0.3}", merge_method="multislerp"),
    "multislerp no base": models("{weight: [0.3, 0.9]}", base=False, merge_method="multislerp"),
    "karcher": models("{}", base=False, merge_method="karcher", parameters="{max_iter: 10, tol: 1e-5}"),
    "task_arithmetic": models("{weight: 0.3}", merge_method="task_arithmetic", parameters="{lambda: 0.8}"),
    "task_arithmetic normalized": models(
        "{weight: 0.3}", merge_method="task_arithmetic", parameters="{normalize: true}"
    ),
    "ties": models("{weight: 0.5, density: 0.3}", merge_method="ties"),
    "ties sum": models(
        "{weight: 0.5, density: 0.3}", merge_method="ties", parameters="{normalize: false, lambda: 0.7}"
    ),
    "ties rescale": models("{weight: 0.5, density: 0.3}", merge_method="ties", parameters="{rescale: true}"),
    "ties gradient": models("{weight: [0.1, 0.9], density: [1, 0.5, 0.1]}", merge_method="ties"),
    "ties filters": models(
        "{weight: [{filter: mlp.down, value: 0.9}, {filter: '*', value: 0.1}], density: 0.4}", merge_method="ties"
    ),
    "ties negative": models("{weight: -0.5, density: 0.3}", merge_method="ties", parameters="{int8_mask: true}"),
    "breadcrumbs": models("{weight: 0.5, density: 0.6, gamma: 0.05}", merge_method="breadcrumbs"),
    "breadcrumbs_ties": models("{weight: 0.5, density: 0.9, gamma: 0.2}", merge_method="breadcrumbs_ties"),
    "model_stock": models("{}", merge_method="model_stock"),
    "model_stock rows": models("{}", merge_method="model_stock", parameters="{filter_wise: true}"),
    "sce": models("{}", merge_method="sce", parameters="{select_topk: 0.4}"),
    "sce all": models("{}", merge_method="sce"),
    "ram": models("{}", merge_method="ram", parameters="{epsilon: 0.001}"),
    "ramplus_tl": models("{}", merge_method="ramplus_tl", parameters="{r: 0.3, alpha: 0.7, epsilon: 0.001}"),
    "nearswap": models("{}", 1, merge_method="nearswap", parameters="{t: 0.001}"),
    "dare density 1": models("{weight: 0.5, density: 1}", merge_method="dare_ties"),
    "della density 1": models("{weight: 0.5, density: 1}", merge_method="della_linear"),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_models(root, tmp_path, case):
    check(*both(root, tmp_path, CASES[case]))


def test_slices(root, tmp_path):
    text = """
slices:
  - sources:
      - {model: ROOT/m1, layer_range: [0, 3], parameters: {weight: [0.2, 0.4]}}
      - {model: ROOT/m2, layer_range: [1, 4], parameters: {weight: 0.5}}
  - sources:
      - {model: ROOT/m3, layer_range: [2, 4], parameters: {weight: 1}}
    parameters: {normalize: false}
merge_method: linear
dtype: float32
"""
    ours, theirs = both(root, tmp_path, text)
    check(ours, theirs)
    assert "model.layers.4.mlp.up_proj.weight" in ours


def test_a_frankenmerge(root, tmp_path):
    text = """
slices:
  - sources: [{model: ROOT/m1, layer_range: [0, 3]}]
  - sources: [{model: ROOT/m2, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}}]
merge_method: passthrough
dtype: float32
"""
    check(*both(root, tmp_path, text), tolerance=0)


def test_slices_with_gradients(root, tmp_path):
    text = """
slices:
  - sources:
      - {model: ROOT/base, layer_range: [0, 4]}
      - {model: ROOT/m2, layer_range: [0, 4]}
merge_method: slerp
base_model: ROOT/base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {value: 0.5}
dtype: float32
"""
    check(*both(root, tmp_path, text))


@pytest.mark.parametrize("case", ["linear", "slerp", "task_arithmetic", "ties", "model_stock", "karcher", "sce"])
def test_bfloat16_is_nearer_to_the_truth_than_mergekit(root, tmp_path, case):
    # mergekit rounds after every operation, we round once; the truth is the same merge in float32.
    ours, theirs = both(root, tmp_path / "16", CASES[case].replace("float32", "bfloat16"), "bf16")
    truth, _ = both(root, tmp_path / "32", CASES[case], "bf16")
    for name, exact in truth.items():
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], exact.to(torch.bfloat16)), name
        error = (theirs[name].float() - exact).abs().mean()
        assert (ours[name].float() - exact).abs().mean() <= error, name
        assert error < 0.05 * exact.abs().mean(), name


def test_arcee_fusion_up_to_elements_at_the_threshold(root, tmp_path):
    # The divergence of two nearly equal softmaxes is mostly rounding in float32, so a few elements fall on the other side.
    ours, theirs = both(root, tmp_path, models("{}", 1, merge_method="arcee_fusion"))
    for name, tensor in theirs.items():
        assert int((ours[name] - tensor).abs().gt(1e-6).sum()) <= max(2, tensor.numel() // 100), name


def test_dtypes(root, tmp_path):
    ours, theirs = both(root, tmp_path, CASES["linear"].replace("float32", "float32\nout_dtype: float16"))
    check(ours, theirs, 1e-3)
    ours, theirs = both(root, tmp_path / "2", CASES["linear"].replace("float32", "float64"), "bf16")
    check(ours, theirs, 1e-12)


VOCABULARIES = {
    "union": "tokenizer: {source: union}",
    "union, legacy": "tokenizer_source: union",
    "base": "tokenizer_source: base",
    "a model": "tokenizer: {source: ROOT/m2}",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 16}",
    "tokens": """tokenizer:
  source: union
  tokens:
    dog: {source: {kind: zero}, force: true}
    bird: {source: ROOT/m2}
    <one>: {source: {kind: model_token, model: ROOT/base, token: cat}}
    <two>: {source: {kind: model_token, model: ROOT/m1, token_id: 3}, force: true}
    <new>: {source: {kind: model_token, model: ROOT/m2, token: bird}}""",
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("case", VOCABULARIES)
def test_vocabularies(tmp_path, case, padding):
    """The same row for the same token; the order of new tokens is mergekit's own affair."""
    llama.write_vocabularies(tmp_path / "f32", padded=padding)
    text = models("{weight: 0.5}", 2, merge_method="task_arithmetic") + VOCABULARIES[case] + "\n"
    ours, theirs = both(tmp_path, tmp_path, text)
    ids = {}
    for who in ("ours", "theirs"):
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / who / "tokenizer.json"))
        ids[who] = tokenizer.get_vocab(with_added_tokens=True)
    assert set(ids["ours"]) == set(ids["theirs"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one, two = ours.pop(name), theirs.pop(name)
        assert one.shape == two.shape
        for token, row in ids["ours"].items():
            assert torch.allclose(one[row], two[ids["theirs"][token]], atol=2e-6), (name, token)
        assert torch.allclose(one[len(ids["ours"]) :], two[len(ids["theirs"]) :], atol=2e-6)
    check(ours, theirs)
    sizes = [json.loads((tmp_path / who / "config.json").read_text())["vocab_size"] for who in ("ours", "theirs")]
    assert sizes[0] == sizes[1] == one.shape[0]


def test_truncated_embeddings(tmp_path):
    llama.write_vocabularies(tmp_path / "f32")
    text = models("{weight: 0.5}", 2, base=False, merge_method="linear").replace("ROOT", str(tmp_path / "f32"))
    options = mergekit_options.MergeOptions(quiet=True, unsafe_truncate_embeddings=True)
    config = mergekit_config.MergeConfiguration.model_validate(yaml.safe_load(text))
    mergekit_merge.run_merge(config, str(tmp_path / "theirs"), options)
    merge_configuration(text, tmp_path / "ours", truncate_embeddings=True)
    with open_store(tmp_path / "ours") as ours, open_store(tmp_path / "theirs") as theirs:
        check(ours.load(), theirs.load())
