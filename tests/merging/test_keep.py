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
