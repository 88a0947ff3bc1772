"""Pairs of one architecture under different names, written as older versions of libraries wrote them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from soups.errors import ConfigError
from soups.stores import open_store
from soups.stores.names import Renames, parse_renames, reconcile

transformers = pytest.importorskip("transformers")

SMALL = {
    "bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20},
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16},
    "llama": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20},
    "gpt_neox": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20},
    "t5": {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 12, "vocab_size": 20},
    "bart": {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20,
        "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
    },
    "opt": {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12, "vocab_size": 20, "word_embed_proj_dim": 8
    },
    "roberta": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20},
    "albert": {
        "hidden_size": 8, "embedding_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20
    },
    "distilbert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "vocab_size": 20},
    "bloom": {"hidden_size": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20},
    "vit": {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4
    },
    "whisper": {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20,
        "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
    },
}  # fmt: skip


def build(class_name, kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL[kind], **more)
    config.architectures = [class_name]
    return getattr(transformers, class_name)._from_config(config)


def write(folder, model, weights, *, config):
    """Write weights under the names that are given; with `config`, in a folder that tells the architecture."""
    folder.mkdir()
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return folder


def saved(model):
    """Return the weights as `save_pretrained` of today writes them: tied tensors once."""
    ties = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ties}


def renamed(weights, *pairs):
    for old, new in pairs:
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def old_bert(model):
    weights = renamed(saved(model), ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    full = dict(model.state_dict())
    weights["cls.predictions.decoder.weight"] = full["cls.predictions.decoder.weight"]
    weights["cls.predictions.decoder.bias"] = full["cls.predictions.decoder.bias"]
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
    return weights


def old_gpt2(model):
    weights = {name.removeprefix("transformer."): tensor for name, tensor in saved(model).items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


def old_llama(model):
    weights = dict(model.state_dict())
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    return weights


def old_neox(model):
    weights = renamed(dict(model.state_dict()), ("lm_head.", "embed_out."))
    for layer in range(2):
        weights[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        weights[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        weights[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(1)
    return weights


def old_opt(model):
    return {
        name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()
    }  # as on the Hub, with the head


def old_vit(model):
    return renamed(
        saved(model),
        (".layers.", ".encoder.layer."),
        ("q_proj", "attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
        ("o_proj", "output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )


def whole(model):
    return dict(model.state_dict())


PAIRS = [
    ("BertForMaskedLM", "bert", old_bert),
    ("GPT2LMHeadModel", "gpt2", old_gpt2),
    ("GPT2LMHeadModel", "gpt2", whole),
    ("LlamaForCausalLM", "llama", old_llama),
    ("GPTNeoXForCausalLM", "gpt_neox", old_neox),
    ("T5ForConditionalGeneration", "t5", whole),
    ("BartForConditionalGeneration", "bart", whole),
    ("OPTForCausalLM", "opt", old_opt),
    ("RobertaForMaskedLM", "roberta", whole),
    ("AlbertForMaskedLM", "albert", whole),
    ("DistilBertForMaskedLM", "distilbert", whole),
    ("BloomForCausalLM", "bloom", whole),
    ("WhisperForConditionalGeneration", "whisper", whole),
    ("ViTForImageClassification", "vit", old_vit),
]


def check(new, old, model, tmp_path, *, config, reverse):
    places = {
        "new": write(tmp_path / "new", model, new, config=config),
        "old": write(
            tmp_path / "old", model, {k: v + 1 if v.is_floating_point() else v for k, v in old.items()}, config=config
        ),
    }
    reference = "old" if reverse else "new"
    stores = {key: open_store(place) for key, place in places.items()}
    shown = reconcile(stores, reference, places).stores
    assert set(shown["new"]) == set(shown["old"])
    unchanged = [name for name in shown[reference] if name in set(stores[reference])]
    assert len(unchanged) >= len(model.state_dict()) - len(model.all_tied_weights_keys)
    for name in shown["new"]:
        first, second = shown["new"].read(name), shown["old"].read(name)
        if first.is_floating_point():  # the old file holds every value of the new one plus one: no tensor is mixed up
            assert torch.equal(first + 1, second), name


@pytest.mark.parametrize("reverse", [False, True], ids=["to the new names", "to the old names"])
@pytest.mark.parametrize(("class_name", "kind", "old"), PAIRS, ids=[f"{kind}-{old.__name__}" for _, kind, old in PAIRS])
def test_old_and_new_names_of_one_architecture(tmp_path, class_name, kind, old, reverse):
    tied = kind != "gpt_neox"
    model = build(class_name, kind, tie_word_embeddings=tied)
    check(saved(model), old(model), model, tmp_path, config=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["to the new names", "to the old names"])
@pytest.mark.parametrize(
    ("class_name", "kind", "old"),
    [pair for pair in PAIRS if pair[1] not in ("gpt_neox", "vit")],
    ids=[f"{kind}-{old.__name__}" for _, kind, old in PAIRS if kind not in ("gpt_neox", "vit")],
)
def test_without_a_library_or_a_configuration(tmp_path, class_name, kind, old, reverse):
    model = build(class_name, kind, tie_word_embeddings=True)
    check(saved(model), old(model), model, tmp_path, config=False, reverse=reverse)


def test_stacks_of_different_depth_keep_their_layers(tmp_path):
    new = build("GPT2LMHeadModel", "gpt2")
    deep = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config(**{**SMALL["gpt2"], "n_layer": 4}))
    stores = {
        "new": open_store(write(tmp_path / "new", new, saved(new), config=True)),
        "deep": open_store(
            write(
                tmp_path / "deep",
                deep,
                {name.removeprefix("transformer."): tensor for name, tensor in saved(deep).items()},
                config=True,
            )
        ),
    }
    shown = reconcile(stores, "new", {key: tmp_path / key for key in stores}).stores
    assert "transformer.h.3.attn.c_attn.weight" in set(shown["deep"])
    assert torch.equal(
        shown["deep"].read("transformer.h.3.mlp.c_fc.bias"), deep.state_dict()["transformer.h.3.mlp.c_fc.bias"]
    )


def test_two_towers_are_not_guessed():
    """One encoder of two equal ones could go to either: the names stay as they are."""
    both = {f"{tower}.layers.{i}.w": torch.zeros(2, 2) for tower in ("text", "vision") for i in range(2)}
    one = {f"layers.{i}.w": torch.ones(2, 2) for i in range(2)}
    shown = reconcile({"both": open_store(both), "one": open_store(one)}, "both").stores
    assert set(shown["one"]) == set(one)
    shown = reconcile(
        {"both": open_store(both), "one": open_store(one)}, "both", rename={r"^layers": "text.layers"}
    ).stores
    assert set(shown["one"]) == {f"text.layers.{i}.w" for i in range(2)}


def test_towers_that_moved_one_by_one():
    """LLaVA's names on the Hub and in the library of today: three prefixes change, each in its own way."""
    layers = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q", "k", "v", "o", "up", "down")]
    old = {f"language_model.model.{name}": torch.rand(3, 3) for name in [*layers, "embed_tokens.weight"]}
    old |= {f"vision_tower.encoder.{name}": torch.rand(2, 2) for name in layers}
    old |= {
        "language_model.lm_head.weight": torch.rand(3, 3),
        "multi_modal_projector.linear_1.weight": torch.rand(3, 2),
    }
    new = {}
    for name, tensor in old.items():
        moved = name.replace("language_model.lm_head", "lm_head").replace(
            "language_model.model.", "model.language_model."
        )
        new[moved.replace("vision_tower", "model.vision_tower").replace("multi_modal", "model.multi_modal")] = tensor
    for reference in ("old", "new"):
        shown = reconcile({"old": open_store(old), "new": open_store(new)}, reference).stores
        assert set(shown["old"]) == set(shown["new"]) == set({"old": old, "new": new}[reference])
        for name in shown["old"]:
            assert torch.equal(shown["old"].read(name), shown["new"].read(name)), name


def test_a_model_with_a_head_of_another_name_gets_none():
    """Its own head is no copy of its embedding, and must not be taken for one."""
    one = {"model.embed_tokens.weight": torch.zeros(5, 3), "lm_head.weight": torch.ones(5, 3)}
    other = {"model.embed_tokens.weight": torch.zeros(5, 3), "embed_out.weight": torch.ones(5, 3)}
    shown = reconcile({"one": open_store(one), "other": open_store(other)}, "one")
    assert not shown.given
    assert "lm_head.weight" not in set(shown.stores["other"])


def test_a_head_that_is_no_tie_is_left_to_the_caller():
    body = {"encoder.w": torch.zeros(3, 3)}
    shown = reconcile(
        {"a": open_store(body), "b": open_store({**body, "classifier.weight": torch.zeros(2, 3)})}, "a"
    ).stores
    assert set(shown["b"]) - set(shown["a"]) == {"classifier.weight"}
    attention = {"layers.0.o_proj.weight": torch.zeros(4, 4), "embed.weight": torch.zeros(4, 4)}
    shown = reconcile({"a": open_store(attention), "b": open_store({"embed.weight": torch.zeros(4, 4)})}, "a").stores
    assert set(shown["b"]) == {"embed.weight"}


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_names(wrapper):
    from soups.merging import merge

    plain = {f"layers.{layer}.{name}.weight": torch.randn(3, 3) for layer in range(2) for name in ("q", "k")}
    wrapped = {name.replace(".q", f".{wrapper}q"): 3 * tensor for name, tensor in plain.items()}
    merged = merge("linear", [plain, wrapped])
    assert set(merged) == set(plain)
    assert all(torch.allclose(merged[name], 2 * plain[name]) for name in plain)


def test_real_biases_called_like_masks_stay():
    weights = {"h.0.attn.bias": torch.ones(6), "h.0.attn.weight": torch.ones(6, 6)}
    shown = reconcile({"a": open_store(weights), "b": open_store({"h.0.attn.weight": torch.ones(6, 6)})}, "a").stores
    assert "h.0.attn.bias" in set(shown["a"])


def test_renames():
    assert parse_renames([r"^a\.=b.", "x=y"])("a.x.x") == "b.y.x"
    with pytest.raises(ConfigError, match="no pair"):
        parse_renames(["abc"])
    with pytest.raises(ConfigError, match="no regular expression"):
        Renames({"(": ""})


def test_a_configuration_of_remote_code_or_an_unknown_type_is_not_an_error(tmp_path):
    from soups.stores.names import architecture_of

    for number, content in enumerate(
        [{"model_type": "nobody"}, {"auto_map": {"AutoModel": "x.Y"}, "model_type": "bert"}, []]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        assert architecture_of(folder) is None
    assert architecture_of(None) is None
    assert architecture_of(tmp_path) is None


def test_merges_bring_models_to_the_base_models_names(tmp_path):
    """From Python and from a configuration: the mean of x and x + 1 is x + 1/2, under the base model's names."""
    from soups.merging import merge
    from soups.merging.mergekit import merge_configuration

    model = build("GPT2LMHeadModel", "gpt2", tie_word_embeddings=True)
    new = write(tmp_path / "new", model, saved(model), config=True)
    old = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in old_gpt2(model).items()}
    write(tmp_path / "old", model, old, config=True)
    places = [tmp_path / "new", tmp_path / "old"]
    configuration = {
        "merge_method": "linear",
        "models": [{"model": str(p), "parameters": {"weight": 1}} for p in places],
    }
    for result in (merge("linear", places), merge_configuration(configuration)):
        with open_store(new) as store:
            assert set(result) == set(store)
            for name in store:
                assert torch.allclose(result[name], store.read(name) + 0.5), name


def test_names_that_nobody_knows_are_listed_with_the_option_that_maps_them():
    from soups.errors import WeightsError
    from soups.merging import merge

    one, other = {"body.w": torch.zeros(2), "tail.w": torch.zeros(3)}, {"body.w": torch.ones(2), "end.w": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"tail.w.*end.w.*rename"):
        merge("linear", [one, other])
    result = merge("linear", [one, other], rename={r"^end\.": "tail."})
    assert torch.equal(result["tail.w"], torch.full((3,), 0.5))
