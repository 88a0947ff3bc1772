"""Stacks of layers: the settings that a config.json has for single layers go where the layers go."""

import json

import pytest
import torch

from soups.errors import ConfigError
from soups.merging.mergekit import merge_configuration
from soups.merging.mergekit.layer_settings import follow_layers
from soups.stores import open_store, write_safetensors

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "linear_attention"]
CONFIG = {
    "architectures": ["A", "B", "C", "D"], "eos_token_id": [1, 2, 3, 4], "num_hidden_layers": 4, "layer_types": KINDS,
    "num_key_value_heads": [1, 2, 3, 4], "mlp_only_layers": [0, 3], "hybrid_override_pattern": "M-*E",
    "intermediate_size": [10, 20, 30, 40], "id2label": {"0": "a"},
}  # fmt: skip


def test_every_kind_of_setting_follows_its_layer():
    order = [0, 1, 3, 2, 1, 0]
    found = follow_layers(CONFIG, [[(CONFIG, layer)] for layer in order], "config.json")
    assert found["num_hidden_layers"] == 6
    assert found["layer_types"] == [KINDS[layer] for layer in order]
    assert found["num_key_value_heads"] == [1, 2, 4, 3, 2, 1]
    assert found["intermediate_size"] == [10, 20, 40, 30, 20, 10]
    assert found["hybrid_override_pattern"] == "M-E*-M"
    assert found["mlp_only_layers"] == [0, 2, 5]
    assert found["architectures"] == CONFIG["architectures"] and found["eos_token_id"] == CONFIG["eos_token_id"]
    nested = {"text_config": CONFIG, "vision_config": {"depth": 4, "fullatt_block_indexes": [1]}}
    inner = follow_layers(nested, [[(nested, layer)] for layer in order], "config.json")
    assert inner == {**nested, "text_config": found}


def test_layers_of_two_kinds_are_not_merged():
    other = {**CONFIG, "layer_types": KINDS[::-1]}
    with pytest.raises(ConfigError, match=r"differ in layer_types \('sliding_attention' and 'linear_attention'\)"):
        follow_layers(CONFIG, [[(CONFIG, 0), (other, 0)]], "config.json")
    mixed = follow_layers(CONFIG, [[(CONFIG, 1)], [(other, 0)], [({}, 2), (CONFIG, 2)]], "config.json")
    assert mixed["layer_types"] == ["full_attention", "linear_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "order", "fits"),
    [
        ({"sliding_window_pattern": 2}, [0, 1, 2, 3, 0, 1], True),
        ({"sliding_window_pattern": 2}, [0, 2, 1, 3], False),
        ({"full_attention_interval": 3}, [0, 1, 2, 3, 4, 5, 3], True),
        ({"decoder_sparse_step": 1}, [3, 1, 0], True),
        ({"first_k_dense_replace": 1}, [0, 2, 1, 2], True),
        ({"first_k_dense_replace": 1}, [0, 0, 1], False),
        ({"max_window_layers": 2}, [3, 2, 1, 0], True),
        ({"max_window_layers": 2, "use_sliding_window": True}, [3, 2, 1, 0], False),
        ({"global_attn_every_n_layers": 3}, [0, 2, 1], False),
        ({"encoder_sparse_step": 2}, [0, 2], False),
        ({"num_dense_layers": 2}, [0, 2, 1], False),
        ({"num_dense_layers": 2}, [1, 0, 3], True),
        ({"moe_layer_start_index": 1}, [1, 0], False),
        ({"block_types": ["r", "r", "a"]}, [0, 1, 2, 4, 3, 5], True),
        ({"block_types": ["r", "r", "a"]}, [0, 2, 1], False),
        ({"num_kv_shared_layers": 2}, [0, 1, 0, 1, 4, 5], True),
        ({"num_kv_shared_layers": 2}, [0, 1, 2, 3], False),
        ({"num_kv_shared_layers": 0}, [3, 0], True),
    ],
)
def test_periods_are_refused_where_they_would_mean_other_layers(config, order, fits):
    config = {"num_hidden_layers": 6, **config}
    stack = [[(config, layer)] for layer in order]
    if fits:
        assert follow_layers(config, stack, "c") == {**config, "num_hidden_layers": len(order)}
        return
    with pytest.raises(ConfigError, match=r"is not of its source's kind. Choose layer ranges"):
        follow_layers(config, stack, "c")


@pytest.mark.parametrize(
    ("key", "value", "silenced_by", "not_by"),
    [
        ("sliding_window_pattern", 2, "layer_types", "mlp_layer_types"),
        ("decoder_sparse_step", 2, "mlp_layer_types", "layer_types"),
        ("first_k_dense_replace", 1, "mlp_layer_types", "layer_types"),
        ("num_dense_layers", 1, "mlp_layer_types", "layer_types"),
        ("interleave_moe_layer_step", 2, "moe_layers", "layer_types"),
    ],
)
def test_a_list_of_attention_says_nothing_of_experts(key, value, silenced_by, not_by):
    """Qwen's and LFM's mixtures have `layer_types` beside a rule for their experts."""
    entries = [1, 3] if silenced_by == "moe_layers" else ["x", "y", "x", "y"]
    listed = {"num_hidden_layers": 4, key: value, silenced_by: entries}
    assert follow_layers(listed, [[(listed, 1)], [(listed, 0)]], "c")[silenced_by] == (
        [0] if entries == [1, 3] else ["y", "x"]
    )
    other = {"num_hidden_layers": 4, key: value, not_by: ["x", "y", "x", "y"]}
    with pytest.raises(ConfigError, match=f"{key}={value} tells by a layer's number"):
        follow_layers(other, [[(other, 1)], [(other, 0)]], "c")


@pytest.mark.parametrize("key", ["moe_layers", "full_attn_idxs"])
def test_the_numbers_of_all_layers_are_numbers(key):
    """Llama 4 lists every layer where all have experts; a stack of more layers has experts in all of them too."""
    config = {"num_hidden_layers": 4, key: [0, 1, 2, 3]}
    found = follow_layers(config, [[(config, layer)] for layer in (0, 1, 2, 1, 2, 3)], "c")
    assert found[key] == [0, 1, 2, 3, 4, 5]


def test_a_stack_is_written_with_its_layers_settings(tmp_path):
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in range(4)), "model.norm.weight"]
    for model, kinds in (("a", KINDS), ("b", KINDS[::-1])):
        folder = tmp_path / model
        folder.mkdir()
        weights = {name: torch.full((2, 2), float(number)) for number, name in enumerate(names)}
        write_safetensors(folder / "model.safetensors", weights)
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "layer_types": kinds}))
    text = (
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {tmp_path}/a, layer_range: [2, 4]}}]\n"
        f"  - sources: [{{model: {tmp_path}/b, layer_range: [0, 1]}}]\n"
        f"  - sources: [{{model: {tmp_path}/a, layer_range: [0, 2]}}]\n"
    )
    out = merge_configuration(text, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == [KINDS[2], KINDS[3], KINDS[3], KINDS[0], KINDS[1]]
    assert config["num_hidden_layers"] == 5
    with open_store(out) as store:
        found = [int(store.read(f"model.layers.{i}.mlp.weight")[0, 0]) for i in range(5)]
    assert found == [3, 4, 1, 1, 2]
