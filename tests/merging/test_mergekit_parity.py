"""Element by element against mergekit itself, where it is installed: `pip install mergekit==0.1.5`."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from soups.merging.mergekit import merge_configuration
from soups.merging.mergekit.methods import SPECS
from soups.merging.mergekit.parameters import REQUIRED
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


@pytest.mark.parametrize("source", ["union", "base"])
def test_a_token_behind_the_embeddings_rows(tmp_path, source):
    # Fine-tunes of Llama 2 have a [PAD] with the first id that the embedding has no row for.
    root = tmp_path / "models"
    llama.write_vocabularies(root / "f32")
    for name in ("base", "m1"):
        path = root / "f32" / name / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"] = {"type": "BPE", "vocab": content["model"]["vocab"], "merges": [], "unk_token": "<unk>"}
        if name == "m1":
            beyond = {**content["added_tokens"][0], "id": 7, "content": "[PAD]"}
            content["added_tokens"].append(beyond)
        path.write_text(json.dumps(content))
    text = (
        "models:\n  - {model: ROOT/base, parameters: {weight: 1}}\n  - {model: ROOT/m1, parameters: {weight: 3}}\n"
        f"merge_method: linear\nbase_model: ROOT/base\ndtype: float32\ntokenizer: {{source: {source}}}\n"
    )
    ours, theirs = both(root, tmp_path, text)
    check(ours, theirs)
    assert "[PAD]" not in (tmp_path / "ours" / "tokenizer.json").read_text()


PER_MODEL = {
    "weight": lambda draw: round(draw.uniform(0.1, 1.5), 3),
    "density": lambda draw: round(draw.uniform(0.2, 0.9), 3),
    "gamma": lambda draw: round(draw.uniform(0.0, 0.2), 3),
}
SHARED = {
    "lambda": lambda draw: round(draw.uniform(0.3, 1.5), 3),
    "normalize": lambda draw: draw.random() < 0.5,
    "rescale": lambda draw: draw.random() < 0.5,
    "t": lambda draw: round(draw.uniform(0.0, 1.0), 3),
    "select_topk": lambda draw: round(draw.uniform(0.2, 1.0), 3),
    "filter_wise": lambda draw: draw.random() < 0.5,
    "epsilon": lambda draw: round(draw.uniform(1e-3, 5e-2), 4),
    "normalize_weights": lambda draw: draw.random() < 0.5,
    "nuslerp_flatten": lambda draw: draw.random() < 0.5,
}
# What differs by design is left out: masks drawn at random.
FUZZED = [
    "linear", "slerp", "nuslerp", "multislerp", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce",
    "nearswap", "arcee_fusion",
]  # fmt: skip


def random_configuration(draw):
    """A configuration with settings of every shape: numbers, gradients over the layers, filters by name, all levels."""
    method = draw.choice(FUZZED)
    spec = SPECS[method]
    count = 1 if method in ("slerp", "nearswap", "arcee_fusion") else 2 if method == "nuslerp" else draw.choice([2, 3])

    def setting(make):
        value = make(draw)
        if isinstance(value, bool) or draw.random() < 0.4:
            return value
        if draw.random() < 0.5:
            return [make(draw) for _ in range(draw.choice([2, 3]))]
        return [{"filter": draw.choice(["mlp", "self_attn", "norm"]), "value": value}, {"value": make(draw)}]

    shared, own = {}, [{} for _ in range(count)]
    for parameter in spec.parameters:
        if parameter.each and parameter.name in PER_MODEL:
            if draw.random() < 0.6 or parameter.name == "weight":
                for one in own:
                    one[parameter.name] = setting(PER_MODEL[parameter.name])
        elif parameter.name in SHARED and (parameter.default is REQUIRED or draw.random() < 0.6):
            shared[parameter.name] = setting(SHARED[parameter.name])
    listed = [{"model": f"ROOT/m{number}", "parameters": one} for number, one in enumerate(own, 1)]
    document = {"merge_method": method, "models": listed, "dtype": "float32"}
    if spec.base == "required" or (spec.base == "optional" and draw.random() < 0.5):
        document["base_model"] = "ROOT/base"
    return document | ({"parameters": shared} if shared else {})


@pytest.mark.parametrize("seed", range(16))
def test_random_configurations_give_mergekits_numbers(root, tmp_path, seed):
    text = yaml.safe_dump(random_configuration(random.Random(seed)), sort_keys=False)
    ours, theirs = both(root, tmp_path, text)
    check(ours, theirs, 5e-6)
