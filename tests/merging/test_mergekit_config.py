"""mergekit's configuration: what it means, and what is said when it is wrong. Numbers: test_mergekit_parity.py."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.errors import ConfigError, SoupError, StorageError, WeightsError
from soups.merging.mergekit import describe_plan, merge_configuration, read_configuration
from soups.merging.mergekit.layers import Layers
from soups.merging.mergekit.parameters import gradient, value_of
from soups.merging.mergekit.schema import Conditional, ModelReference
from soups.stores import open_store, write_safetensors

spec = importlib.util.spec_from_file_location("merging_llama_config", Path(__file__).parent / "llama.py")
llama = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = llama
spec.loader.exec_module(llama)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return llama.write_family(tmp_path_factory.mktemp("config") / "models", torch.bfloat16, count=2)


def merged(root, text, out=None, **options):
    return merge_configuration(text.replace("ROOT", str(root)), out, **options)


LINEAR = """
models:
  - model: ROOT/m1
    parameters:
      weight: 0.25
  - model: ROOT/m2
    parameters:
      weight: 0.75
merge_method: linear
dtype: float32
"""


def test_a_linear_merge(root, tmp_path):
    weights = merged(root, LINEAR)
    with open_store(root / "m1") as one, open_store(root / "m2") as two:
        for name, tensor in weights.items():
            expected = 0.25 * one.read(name).float() + 0.75 * two.read(name).float()
            assert tensor.dtype == torch.float32 and torch.allclose(tensor, expected, atol=1e-7)
    merged(root, LINEAR, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["num_hidden_layers"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "soups"] and "merge_method: linear" in card
    text = LINEAR.replace("ROOT", str(root))
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_a_mapping_is_as_good_as_a_file(root, tmp_path):
    (tmp_path / "merge.yml").write_text(LINEAR.replace("ROOT", str(root)))
    mapping = yaml.safe_load(LINEAR.replace("ROOT", str(root)))
    left, right = merge_configuration(mapping), merge_configuration(tmp_path / "merge.yml")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_more_layers_are_written_to_the_configuration(root, tmp_path):
    text = """
slices:
  - sources: [{model: ROOT/m1, layer_range: [0, 3]}]
  - sources: [{model: ROOT/m2, layer_range: [1, 4]}]
merge_method: passthrough
"""
    merged(root, text, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    with open_store(tmp_path / "out") as out, open_store(root / "m1") as one, open_store(root / "m2") as two:
        assert out.meta("model.layers.5.mlp.up_proj.weight").dtype == torch.bfloat16
        for layer, (source, original) in enumerate([(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3)]):
            name = "model.layers.{}.mlp.up_proj.weight"
            assert torch.equal(out.read(name.format(layer)), source.read(name.format(original)))
        assert torch.equal(out.read("model.embed_tokens.weight"), one.read("model.embed_tokens.weight"))
        assert torch.equal(out.read("lm_head.weight"), two.read("lm_head.weight"))


def test_flat_files_and_training_checkpoints(tmp_path):
    for number in (1, 2):
        torch.save({"state_dict": {"net.0.weight": torch.full((2, 2), float(number))}}, tmp_path / f"{number}.ckpt")
    text = f"""
models: [{{model: {tmp_path}/1.ckpt, parameters: {{weight: 1}}}}, {{model: {tmp_path}/2.ckpt, parameters: {{weight: 3}}}}]
merge_method: linear
"""
    merge_configuration(text, tmp_path / "out.safetensors")
    with open_store(tmp_path / "out.safetensors") as store:
        assert store.read("net.0.weight")[0, 0] == 1.75


def test_several_documents(root, tmp_path):
    text = (
        LINEAR.replace("merge_method", "name: half\nmerge_method")
        + "---\n"
        + "models: [{model: half}]\nbase_model: ROOT/base\nmerge_method: slerp\nparameters: {t: 0.5}\n"
    )
    result = merged(root, text, tmp_path / "out")
    assert result == tmp_path / "out" and [path.name for path in tmp_path.iterdir()] == ["out"]
    in_memory = merged(root, text)
    with open_store(result) as store:
        assert all(torch.equal(store.read(name), tensor) for name, tensor in in_memory.items())
    with pytest.raises(ConfigError, match="need each other"):
        merged(
            root,
            "models: [{model: a}]\nname: a\nmerge_method: passthrough\n---\nmodels: [{model: a}]\nmerge_method: passthrough",
        )
    with pytest.raises(ConfigError, match="exactly one"):
        merged(root, LINEAR + "---\n" + LINEAR)


def test_the_seed_and_only_the_seed_decides(root):
    text = """
models: [{model: ROOT/m1, parameters: {weight: 1, density: 0.5}}, {model: ROOT/m2, parameters: {weight: 1, density: 0.5}}]
base_model: ROOT/base
merge_method: dare_ties
"""
    one, again, other = merged(root, text), merged(root, text, threads=1, budget=1), merged(root, text, seed=1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("merge_method: linear", "merge_method: dare-ties"),
            r"line 9: merge_method 'dare-ties' is unknown; did you mean",
        ),
        (("merge_method: linear\n", ""), r"'merge_method' is missing"),
        (("dtype: float32", "dtype: bf16"), r"line 10: dtype: 'bf16' is no dtype; write 'bfloat16'"),
        (("ROOT/m2", "ROOT/m1"), r"line 2: .*m1 occurs twice"),
        (("weight: 0.75", "weight: heavy"), r"line 2: weight: 'heavy' is no float"),
        (("weight: 0.75", "weight: {}"), r"line 8: models\.1\.parameters\.weight"),
        (("    parameters:\n      weight: 0.75\n", ""), r"parameter 'weight' is required"),
        (("weight: 0.75", "weight: [{filter: mlp, value: 1}]"), r"required and has no value for tensor"),
        (("ROOT/m2", "ROOT/m2+a+b"), r"line 6: models\.1\.model: .*is no model reference"),
        (("models:", "slices:"), r"'sources' is missing"),
        (("ROOT/m2", "ROOT/nothing"), r"no checkpoint at"),
        (("models:", "models: []\nold:"), r"exactly one of models, slices and modules"),
    ],
)
def test_mistakes_are_named_with_their_line(root, change, message):
    assert change[0] in LINEAR
    with pytest.raises(SoupError, match=message):
        merged(root, LINEAR.replace(*change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{model: ROOT/m1}]\nmerge_method: ties\nparameters: {weight: 1}", "ties needs base_model"),
        ("models: [{model: ROOT/m1}, {model: ROOT/m2}]\nbase_model: ROOT/base\nmerge_method: slerp\nparameters: {t: 0.5}", "exactly 1"),
        ("models: [{model: ROOT/m1, parameters: {weight: 1}}]\nbase_model: ROOT/base\nmerge_method: linear", "has no weight"),
        ("slices: [{sources: [{model: ROOT/m1, layer_range: [2, 5]}]}]\nmerge_method: passthrough", "after its 4 layers"),
        ("slices: [{sources: [{model: ROOT/m1, layer_range: [2, 1]}]}]\nmerge_method: passthrough", "first < last"),
        ("modules: {vision: {models: [{model: ROOT/m1}]}}\nmerge_method: passthrough", "no tensor belongs to module 'vision'"),
        ("models: [{model: ROOT/m1}]\nmerge_method: passthrough\ntokenizer: {tokens: {a: b}}", "line 3: tokenizer.tokens.a"),
        ("models: [{model: ROOT/m1}]\nmerge_method: passthrough\nchat_template: chatlm", "neither 'auto', nor one of alpaca, chatml"),
        ("models: [{model: ROOT/m1}]\nmerge_method: linear\nsearch: {weight: [1, 2]}", "line 3: a search needs a held-out score"),
        ("[1, 2]\n", "a mapping"),
        ("models: [\n", "no valid YAML"),
        ("\n", "is empty"),
    ],
)  # fmt: skip
def test_more_mistakes(root, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        merged(root, text + "\n", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_ignored_is_a_warning_and_strictly_an_error(root):
    text = LINEAR.replace("weight: 0.75", "weight: 0.75\n      wieght: 3") + "dtpye: float16\n"
    warnings = []
    merged(root, text, warn=warnings.append)
    assert len(warnings) == 2
    assert "line 12: unknown key 'dtpye' was ignored; did you mean 'dtype'" in warnings[0]
    assert "no parameter 'wieght', which was ignored; did you mean 'weight'" in warnings[1]
    with pytest.raises(ConfigError, match="an error because of --strict"):
        merged(root, text, strict=True)
    text = "models: [{model: ROOT/m1}, {model: ROOT/m2}]\nbase_model: ROOT/base\nmerge_method: karcher\n"
    warnings = []
    merged(root, text, warn=warnings.append)
    assert "merged as an input of karcher" in warnings[0]


def test_models_of_other_shapes_are_named(root, tmp_path):
    weights = llama.weights(5, vocabulary=101)
    write_safetensors(tmp_path / "other.safetensors", weights)
    with pytest.raises(WeightsError, match=r"mis-shaped \('model.embed_tokens.weight'|mis-shaped \('lm_head"):
        merged(root, LINEAR.replace("ROOT/m2", str(tmp_path / "other.safetensors")))
    with pytest.raises(StorageError, match="in one place"):
        merged(root, LINEAR, root / "m1", overwrite=True)


def test_a_plan_reads_no_tensor(root):
    _, (planned,) = describe_plan(LINEAR.replace("ROOT", str(root)))
    with open_store(root / "m1") as store:
        size = sum(store.meta(name).numel for name in store)
    assert planned.plan.bytes_to_read == 2 * 2 * size and planned.plan.bytes_to_write == 4 * size


def test_tied_heads_stay_tied(tmp_path):
    for number in (1, 2):
        embed = torch.full((4, 2), float(number))
        write_safetensors(tmp_path / f"{number}.safetensors", {"embed.weight": embed, "head.weight": embed})
    text = (
        f"models: [{{model: {tmp_path}/1.safetensors}}, {{model: {tmp_path}/2.safetensors}}]\nmerge_method: karcher\n"
    )
    weights = merge_configuration(text)
    assert weights["embed.weight"] is weights["head.weight"]


def test_models_that_leave_the_tied_head_out_merge_with_those_that_have_one(root, tmp_path):
    with open_store(root / "m1") as store:
        weights = store.load()
    tied = tmp_path / "tied"
    tied.mkdir()
    del weights["lm_head.weight"]
    write_safetensors(tied / "model.safetensors", weights)
    config = json.loads((root / "m1" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    text = LINEAR.replace("ROOT/m1", str(tied))
    merged(root, text, tmp_path / "out")
    with open_store(tmp_path / "out") as out, open_store(root / "m2") as two:
        expected = 0.25 * weights["model.embed_tokens.weight"].float() + 0.75 * two.read("lm_head.weight").float()
        assert torch.allclose(out.read("lm_head.weight"), expected, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    both = merged(root, "models: [{model: A}, {model: A/../tied}]\nmerge_method: karcher\n".replace("A", str(tied)))
    assert "lm_head.weight" not in both


def test_adapters_are_merged_while_reading(root, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    write_safetensors(adapter / "adapter_model.safetensors", {name.format("A"): a, name.format("B"): b})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    text = f"models: [{{model: ROOT/base+{adapter}}}]\nmerge_method: passthrough\ndtype: float32\n"
    merged(root, text, tmp_path / "out")
    with open_store(tmp_path / "out") as out, open_store(root / "base") as base:
        key = "model.layers.0.self_attn.q_proj.weight"
        assert torch.allclose(out.read(key), base.read(key).float() + b @ a, atol=0.05)
        assert torch.equal(out.read("model.norm.weight"), base.read("model.norm.weight").float())
    assert (tmp_path / "out" / "config.json").exists()


def test_references():
    parsed = ModelReference.model_validate("a/b@main+c/d@v1")
    assert (parsed.path, parsed.revision, parsed.lora, parsed.lora_revision) == ("a/b", "main", "c/d", "v1")
    assert str(parsed) == "a/b@main+c/d@v1"
    assert ModelReference.model_validate({"model": {"path": "a", "revision": "r"}, "lora": "c"}) == ModelReference(
        path="a", revision="r", lora="c"
    )


def test_gradients_and_filters():
    assert [gradient([0, 1, 0.5], t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    assert [gradient([True, False], t) for t in (0, 0.9, 1)] == [True, True, False]
    filters = [Conditional(value=1, filter="mlp"), Conditional(value=[0, 10], filter="*"), Conditional(value=3)]
    assert value_of(filters, "x.mlp.w", 0.5) == 1 and value_of(filters, "x.attn.w", 0.5) == 5
    assert value_of(filters[:1], "x.attn.w", 0.5) is None


def test_layers_of_other_architectures():
    resnet = Layers(
        ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.bn.weight", "fc.weight"]
    )
    assert resnet.stacks == ["layer1.", "layer2."] and resnet.count("layer1.") == 2
    moe = Layers(["model.layers.1.experts.7.w"])
    assert moe.place("model.layers.1.experts.7.w")[:2] == ("model.layers.", 1)
    plain = Layers(["0.weight", "2.weight"])
    assert plain.stacks == [""] and plain.count("") == 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_files_give_an_error_or_a_recipe(data):
    text = LINEAR + "parameters: {normalize: [{filter: a, value: 1}]}\ntokenizer: {source: union}\n"
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.text(max_size=3)) + text[place + data.draw(st.integers(0, 5)) :]
    with contextlib.suppress(SoupError):
        read_configuration(text + "\n")


def test_an_interrupted_recipe_of_several_documents_goes_on(tmp_path, monkeypatch):
    from soups.merging.mergekit import run as module

    llama.write_family(tmp_path / "f", count=2)
    text = (
        "name: first\nmerge_method: linear\nmodels:\n"
        "- {model: ROOT/m1, parameters: {weight: 1}}\n- {model: ROOT/m2, parameters: {weight: 1}}\n---\n"
        "merge_method: slerp\nbase_model: ROOT/base\nmodels: [{model: first}, {model: ROOT/base}]\nparameters: {t: 0.5}\n"
    ).replace("ROOT", str(tmp_path / "f"))
    made = []
    execute = module.execute

    def failing(plan, target, **options):
        made.append(Path(target).name if target else None)
        if len(made) == 2:
            raise KeyboardInterrupt
        return execute(plan, target, **options)

    monkeypatch.setattr(module, "execute", failing)
    with pytest.raises(KeyboardInterrupt):
        merge_configuration(text, tmp_path / "out")
    merge_configuration(text, tmp_path / "out")
    assert made == ["first", "out", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "out"]
    whole = merge_configuration(text)
    with open_store(tmp_path / "out") as store:
        assert all(torch.equal(store.read(name), whole[name]) for name in store)
