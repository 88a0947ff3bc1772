"""Tensors that are kept from the base: heads of other sizes; and a chat vector onto a vision-language model."""

import json

import pytest
import torch

from soups import merge
from soups.errors import ConfigError, WeightsError
from soups.merging.mergekit import merge_configuration
from soups.stores import open_store, write_safetensors


def classifier(seed, classes):
    draw = torch.Generator().manual_seed(seed)
    weights = {f"body.{layer}.weight": torch.randn(4, 4, generator=draw) for layer in range(4)}
    if classes:
        weights["classifier.weight"] = torch.randn(classes, 4, generator=draw)
        weights["classifier.bias"] = torch.randn(classes, generator=draw)
    return weights


BASE, ONE, TWO = classifier(0, 3), classifier(1, 5), classifier(2, 0)
HEAD = ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("patterns", [["classifier.*"], ["*.bias", "classifier.w*"]])
def test_a_head_is_the_bases_and_the_rest_is_merged(patterns):
    found = merge("task_arithmetic", [ONE, TWO], base=BASE, weight=[0.5, 0.25], scale=1.0, keep=patterns)
    assert set(found) == set(BASE)
    assert all(torch.equal(found[name], BASE[name]) for name in HEAD)
    for name in set(BASE) - set(HEAD):
        start = BASE[name].double()
        expected = start + 0.5 * (ONE[name].double() - start) + 0.25 * (TWO[name].double() - start)
        assert torch.allclose(found[name].double(), expected, atol=1e-6)


def test_without_a_base_the_first_model_gives_the_head_and_its_dtype():
    first = {**ONE, "classifier.weight": ONE["classifier.weight"].half()}
    found = merge("linear", [first, BASE, TWO], keep=["classifier.*"], dtype=torch.float64)
    assert found["classifier.weight"].dtype == torch.float16
    assert all(torch.equal(found[name], first[name]) for name in HEAD)
    name = "body.2.weight"
    assert torch.equal(found[name], torch.stack([one[name].double() for one in (ONE, BASE, TWO)]).mean(0))
    without = merge("linear", [TWO, ONE], keep=["classifier.*"])
    assert set(without) == set(TWO), "a tensor that only another model has is ignored"


@pytest.mark.parametrize("other", [ONE, TWO])
def test_the_error_names_the_option(other, tmp_path):
    with pytest.raises(WeightsError, match=r'set keep to \["classifier\.\*"\]\.$'):
        merge("linear", [BASE, other])
    for name, weights in (("a", BASE), ("b", other)):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
    text = f"merge_method: linear\nmodels: [{{model: {tmp_path}/a.safetensors}}, {{model: {tmp_path}/b.safetensors}}]\n"
    with pytest.raises(WeightsError, match=r'set keep to \["classifier\.\*"\]\.$'):
        merge_configuration(text + "parameters: {weight: 1}\n")
    found = merge_configuration(text + 'parameters: {weight: 1}\nkeep: ["classifier.*"]\n')
    assert torch.equal(found["classifier.bias"], BASE["classifier.bias"])
    mean = (BASE["body.0.weight"].double() + other["body.0.weight"].double()) / 2
    assert torch.allclose(found["body.0.weight"].double(), mean, atol=1e-7)
    with pytest.raises(ConfigError, match=r"line 4: keep: 'clasifier\.\*' matches no tensor"):
        merge_configuration(text + 'parameters: {weight: 1}\nkeep: ["clasifier.*"]\n')


def test_models_of_another_architecture_get_no_such_advice():
    with pytest.raises(WeightsError, match="architecture") as caught:
        merge("linear", [BASE, {"other": torch.ones(1), "names": torch.ones(1)}])
    assert "keep" not in str(caught.value)


def test_patterns_that_match_nothing_or_everything():
    with pytest.raises(ConfigError, match=r"'clasifier\.\*' matches no tensor"):
        merge("linear", [BASE, ONE], keep=["classifier.*", "clasifier.*"])
    with pytest.raises(ConfigError, match="matches every tensor"):
        merge("linear", [BASE, BASE], keep=["*"])


def test_layers_of_slices_and_other_vocabularies_are_refused(tmp_path):
    for name in ("a", "b"):
        weights = {f"model.layers.{i}.mlp.weight": torch.ones(2, 2) for i in range(3)} | {
            "lm_head.weight": torch.ones(5, 2)
        }
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
    slices = f"merge_method: passthrough\nslices: [{{sources: [{{model: {tmp_path}/a.safetensors, layer_range: [0, 2]}}]}}]\n"
    with pytest.raises(ConfigError, match="belongs to a layer, and slices decide"):
        merge_configuration(slices + 'keep: ["*.mlp.*"]\n')
    assert len(merge_configuration(slices + "keep: [lm_head.weight]\n")) == 3
    models = (
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/a.safetensors}}, {{model: {tmp_path}/b.safetensors}}]\n"
        f"parameters: {{weight: 1}}\nkeep: [lm_head.weight]\ntokenizer: {{source: union}}\n"
    )
    with pytest.raises(ConfigError, match="must then be the base's too"):
        merge_configuration(models)


@pytest.mark.parametrize("kept", [["lm_head.weight"], ["*embed_tokens*"], ["lm_head.weight", "*embed_tokens*"]])
@pytest.mark.parametrize("configured", [False, True])
def test_kept_heads_are_untied_and_kept_pairs_stay_tied(kept, configured, tmp_path):
    for number, name in enumerate(("a", "b")):
        draw = torch.Generator().manual_seed(number)
        embedding = torch.randn(6, 3, generator=draw)
        body = {f"model.layers.0.{part}.weight": torch.randn(3, 3, generator=draw) for part in "qkvo"}
        (tmp_path / name).mkdir()
        torch.save(
            {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding, **body},
            tmp_path / name / "pytorch_model.bin",
        )
        (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    out = tmp_path / "out"
    if configured:
        merge_configuration(
            {
                "merge_method": "linear",
                "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("a", "b")],
                "keep": kept,
            },
            out,
        )
    else:
        merge("linear", [tmp_path / "a", tmp_path / "b"], out=out, keep=kept)
    with open_store(out) as store, open_store(tmp_path / "a") as one, open_store(tmp_path / "b") as two:
        own, other = one.read("lm_head.weight"), two.read("lm_head.weight")
        mean = (own + other) / 2
        head, embedding = store.read("lm_head.weight"), store.read("model.embed_tokens.weight")
        assert torch.equal(head, own if "lm_head.weight" in kept else mean)
        assert torch.equal(embedding, own if "*embed_tokens*" in kept else mean)
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (len(kept) == 2)


def write_vision_model(folder, names="today"):
    """Write `vlm`, `base` and `chat`: a tiny LLaVA and two tiny Llamas that its language model has the shapes of."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "projection_dim": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, vocab_size=41 if names == "more tokens" else 40),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=39,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "vlm")
    if names == "module":  # as the module has them: model.language_model.layers.0…
        with open_store(folder / "vlm") as store:
            assert set(store) != set(model.state_dict())
        (folder / "vlm/model.safetensors").unlink()
        write_safetensors(folder / "vlm/model.safetensors", {k: v.clone() for k, v in model.state_dict().items()})
    (folder / "vlm/preprocessor_config.json").write_text("{}")
    for seed, name in enumerate(("base", "chat"), 1):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, vocab_size=40)).save_pretrained(folder / name)
    return transformers


CHAT_VECTOR = """
merge_method: task_arithmetic
base_model: FOLDER/vlm
modules:
  text_decoder:
    models:
      - {model: FOLDER/chat, parameters: {weight: 1.0}}
      - {model: FOLDER/base, parameters: {weight: -1.0}}
  default:
    models: [{model: FOLDER/vlm}]
"""
BY_PATTERN = """
merge_method: task_arithmetic
base_model: FOLDER/vlm
models:
  - {model: FOLDER/chat, parameters: {weight: 1.0}}
  - {model: FOLDER/base, parameters: {weight: -1.0}}
keep: ["*vision_tower*", "*multi_modal_projector*"]
"""
RENAMED = (
    CHAT_VECTOR
    + r'rename: {"^model\\.(?=layers|embed_tokens|norm)": "language_model.model.", "^lm_head": "language_model.lm_head"}'
)
TOKENS = 'keep: ["*embed_tokens*", "*lm_head*"]\n'


@pytest.mark.parametrize(
    ("names", "configuration"),
    [
        ("today", CHAT_VECTOR),
        ("module", CHAT_VECTOR),
        ("today", BY_PATTERN),
        ("module", BY_PATTERN),
        ("today", RENAMED),
        ("more tokens", CHAT_VECTOR + TOKENS),
    ],
)
def test_a_chat_vector_onto_a_vision_model(names, configuration, tmp_path):
    transformers = write_vision_model(tmp_path, names)
    out = tmp_path / "out"
    merge_configuration(configuration.replace("FOLDER", str(tmp_path)), out)
    with open_store(tmp_path / "vlm") as own, open_store(out) as store:
        assert set(store) == set(own)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    found, details = load(out, output_loading_info=True)
    assert not details["missing_keys"] and not details["unexpected_keys"] and not details["mismatched_keys"]
    before = load(tmp_path / "vlm").state_dict()
    chat, base = (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / one).state_dict() for one in ("chat", "base")
    )
    plain = {name.replace("model.", "model.language_model.", 1): name for name in chat if name.startswith("model.")}
    plain["lm_head.weight"] = "lm_head.weight"
    moved = 0
    for name, tensor in found.state_dict().items():
        kept = "more tokens" in names and ("embed_tokens" in name or "lm_head" in name)
        if name in plain and not kept:
            expected = before[name].double() + chat[plain[name]].double() - base[plain[name]].double()
            assert torch.allclose(tensor.double(), expected, atol=1e-6), name
            moved += not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name
    assert moved >= 14  # all but the norms, which are ones in every new model
    assert (out / "preprocessor_config.json").is_file()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava"
    found(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_base_alone_in_a_module_gets_the_outputs_dtype(tmp_path):
    weights = {
        f"{part}.{i}.weight": torch.randn(3, 3) for part in ("vision_tower", "language_model.layers") for i in (0, 1)
    }
    for name in ("vlm", "tuned"):
        write_safetensors(tmp_path / f"{name}.safetensors", weights)
    found = merge_configuration(
        f"merge_method: ties\nbase_model: {tmp_path}/vlm.safetensors\ndtype: bfloat16\nmodules:\n"
        f"  text_decoder: {{models: [{{model: {tmp_path}/tuned.safetensors, parameters: {{weight: 1, density: 1}}}}]}}\n"
        f"  vision_tower: {{models: [{{model: {tmp_path}/vlm.safetensors}}]}}\n"
    )
    assert all(torch.equal(found[name], weights[name].bfloat16()) for name in weights)
