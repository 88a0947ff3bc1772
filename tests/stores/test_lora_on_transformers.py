"""Adapters on transformers' models against PEFT, on bases in memory and on bases as `save_pretrained` names their tensors."""

import pytest
import torch
from safetensors.torch import save_file

from soups.errors import StorageError, WeightsError
from soups.stores import open_store
from tests.stores.test_lora_against_peft import check, trained

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
SEQ2SEQ = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "vocab_size": 20,
}  # fmt: skip
VISION = {**TEXT, "image_size": 8, "patch_size": 4}
del VISION["vocab_size"]


def build(class_name, kind, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.architectures = [class_name]
    return getattr(transformers, class_name)._from_config(config)


def llama(**more):
    return build("LlamaForCausalLM", "llama", **TEXT, num_key_value_heads=1, **more)


def gpt2(name="GPT2LMHeadModel", **more):
    return build(name, "gpt2", n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16, **more)


def opt():
    return build("OPTForCausalLM", "opt", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12,
                 vocab_size=20, word_embed_proj_dim=8)  # fmt: skip


def mixtral():
    return build("MixtralForCausalLM", "mixtral", **TEXT, num_key_value_heads=1, num_local_experts=3)


def llava():
    return build(
        "LlavaForConditionalGeneration",
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=19,
        vision_feature_layer=-1,
    )


def clip():
    return build("CLIPModel", "clip", text_config=TEXT, vision_config=VISION, projection_dim=6)


QV = ["q_proj", "v_proj"]
CASES = {
    "llama": (llama, {"target_modules": QV}),
    "llama, all linear": (llama, {"target_modules": "all-linear"}),
    "llama, dora": (llama, {"target_modules": [*QV, "down_proj"], "use_dora": True}),
    "llama, embedding and head": (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "llama, embedding and head saved": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "llama, rows": (llama, {"target_modules": QV, "trainable_token_indices": [7, 3]}),
    "llama, rows of two": (llama, {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 2]}}),
    "tied llama": (lambda: llama(tie_word_embeddings=True), {"target_modules": QV}),
    "tied llama, head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
    "tied llama, embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "tied llama, both": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied llama, both by dora": (
        lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    ),
    "tied llama, kept tied": (
        lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied llama, rows": (lambda: llama(tie_word_embeddings=True), {"target_modules": QV, "trainable_token_indices": [7, 3]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"]}),
    "gpt2, square Conv1D and head": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]}),
    "gpt2, embedding": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "gpt2, one square Conv1D": (gpt2, {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
    "gpt2 classifier": (
        lambda: gpt2("GPT2ForSequenceClassification", num_labels=3, pad_token_id=0),
        {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
    ),
    "bert classifier": (
        lambda: build("BertForSequenceClassification", "bert", **TEXT, num_labels=4),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "bert, dense and embeddings": (
        lambda: build("BertModel", "bert", **TEXT), {"target_modules": ["dense", "word_embeddings"]},
    ),
    "opt": (opt, {"target_modules": QV, "bias": "all"}),
    "opt, head": (opt, {"target_modules": ["lm_head", "fc1"]}),
    "t5": (
        lambda: build("T5ForConditionalGeneration", "t5", d_model=8, num_layers=2, num_heads=2, d_kv=4, d_ff=12, vocab_size=20),
        {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"},
    ),
    "bart": (lambda: build("BartForConditionalGeneration", "bart", **SEQ2SEQ), {"target_modules": [*QV, "shared"]}),
    "vit": (
        lambda: build("ViTForImageClassification", "vit", **VISION),
        {"target_modules": QV, "modules_to_save": ["classifier"]},
    ),
    "vit, convolution": (lambda: build("ViTModel", "vit", **VISION), {"target_modules": ["projection", "fc1"]}),
    "clip": (clip, {"target_modules": QV}),
    "llava": (llava, {"target_modules": QV}),
    "llava, language model and projector": (
        llava, {"target_modules": r".*language_model.*\.(q_proj|down_proj)|.*multi_modal_projector\.linear_1|lm_head"},
    ),
    "mixtral": (mixtral, {"target_modules": QV}),
    "mixtral experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "mixtral, old names of experts": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "qwen2 moe": (
        lambda: build("Qwen2MoeForCausalLM", "qwen2_moe", **TEXT, num_key_value_heads=1, num_experts=3,
                      moe_intermediate_size=6, shared_expert_intermediate_size=6),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "falcon": (
        lambda: build("FalconForCausalLM", "falcon", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=20),
        {"target_modules": ["query_key_value", "dense"]},
    ),
    "gpt_neox": (
        lambda: build("GPTNeoXForCausalLM", "gpt_neox", **TEXT), {"target_modules": ["query_key_value", "lm_head"]},
    ),
    "roberta, tied decoder": (
        lambda: build("RobertaForMaskedLM", "roberta", **TEXT), {"target_modules": ["query", "word_embeddings"]},
    ),
    "whisper": (
        lambda: build("WhisperForConditionalGeneration", "whisper", **SEQ2SEQ, pad_token_id=1, bos_token_id=1, eos_token_id=1,
                      decoder_start_token_id=1),
        {"target_modules": [*QV, "conv1"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_models(tmp_path, case):
    factory, settings = CASES[case]
    model = factory()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ties = dict(model.all_tied_weights_keys)
    base |= {name: base[first] for name, first in ties.items()}
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged_model = wrapped.merge_and_unload()
    merged = {name: tensor.clone() for name, tensor in merged_model.state_dict().items()}
    check(base, tmp_path / "adapter", merged)
    # The base as the library saves it: under the names of the Hub, tied tensors once, experts one by one.
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as store:
        weights = {name: store.read(name).clone().contiguous() for name in store if name not in store.tied()}
        untied = [name for name in merged if name in ties and not torch.equal(merged[name], merged[ties[name]])]
    out = tmp_path / "out"
    out.mkdir()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    merged_model.config.tie_word_embeddings = bool(ties) and not untied
    merged_model.config.save_pretrained(out)
    loaded = type(merged_model).from_pretrained(out).state_dict()
    for name, expected in merged.items():
        if name not in ties or not untied:
            assert torch.allclose(loaded[name], expected, rtol=1e-5, atol=3e-6 * float(expected.abs().max())), name


def test_a_saved_head_leaves_the_tie(tmp_path):
    """Only the head was trained in full: it gets a tensor of its own, and the embedding stays the base's."""
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, target_modules=QV, modules_to_save=["lm_head"])
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as store:
        assert not store.tied()
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(store.read(name), merged[name])
    both = {"lm_head.weight": torch.zeros(20, 8)}
    both["model.embed_tokens.weight"] = both["lm_head.weight"]
    body = {
        name: tensor for name, tensor in model.state_dict().items() if "base_layer" not in name and "lora" not in name
    }
    body = {
        name.replace(".original_module", ""): tensor for name, tensor in body.items() if "modules_to_save" not in name
    }
    with open_store({**body, **both}, adapter=tmp_path / "adapter") as store:
        assert not store.tied()
        assert torch.equal(store.read("lm_head.weight"), merged["lm_head.weight"])
        assert not store.read("model.embed_tokens.weight").any()


def test_a_saved_embedding_leaves_the_head_as_it_was(tmp_path):
    """The base on disk leaves the tied head out; PEFT trains a copy of the embedding, and the head keeps the base's rows."""
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, target_modules=QV, modules_to_save=["embed_tokens"])
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as store:
        assert not store.tied()
        assert set(store) == set(merged)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(store.read(name), merged[name])
            assert store.identity(name) is not None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": QV},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": QV, "trainable_token_indices": [21]},
    ],
    ids=["untouched", "adapted", "rows"],
)
def test_resized_vocabularies(tmp_path, settings, tied):
    """The embedding grew by two rows before training; PEFT saves it whole beside the factors."""
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(22)
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    if not tied and "embed_tokens" in settings["target_modules"]:  # PEFT leaves the head's new rows out of the file
        with pytest.raises(WeightsError, match="without the head's new rows"):
            open_store(tmp_path / "base", adapter=tmp_path / "adapter")
        return
    merged = {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as store:
        assert store.meta("model.embed_tokens.weight").shape == (22, 8)
        for name in store:
            assert torch.allclose(store.read(name), merged[name], rtol=1e-5, atol=1e-6), name
        assert torch.equal(
            store.read("model.embed_tokens.weight", slice(20, 22)), store.read("model.embed_tokens.weight")[20:]
        )


def test_a_classifiers_head_is_added_to_a_language_model(tmp_path):
    """The base on disk is a causal model; the adapter was trained on it as a classifier."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    classifier = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=0
    )
    wrapped = trained(classifier, target_modules=QV, task_type="SEQ_CLS")
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as store:
        assert set(merged) <= set(store)
        for name, expected in merged.items():
            assert torch.allclose(store.read(name), expected, rtol=1e-5, atol=1e-6), name


def test_old_adapters_of_separate_experts_on_stacked_ones(tmp_path):
    """One expert's factors change its part of the stacked parameter, and nothing else."""
    model = mixtral()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a, b = torch.randn(2, 8), torch.randn(12, 2)
    key = "base_model.model.model.layers.1.mlp.experts.2.w3.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    name = "model.layers.1.mlp.experts.gate_up_proj"
    expected = base[name].clone()
    expected[2, 12:] += 2 * b @ a
    with open_store(base, adapter=tmp_path) as store:
        assert torch.allclose(store.read(name), expected, rtol=1e-6)
        assert store.changed() == [name]


def pool_of_adapters(tmp_path, count=2, body="BertForPreTraining"):
    """A run folder as PEFT and transformers' Trainer leave it: one base, an adapter and a state of training in each checkpoint."""
    torch.manual_seed(0)
    body = build(body, "bert", **TEXT)
    body.save_pretrained(tmp_path / "base")
    merged = []
    for number in range(count):
        torch.manual_seed(number)
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        wrapped = trained(model, target_modules=["query"], task_type="SEQ_CLS", r=number + 1)
        wrapped.peft_config["default"].base_model_name_or_path = "../../base"
        folder = tmp_path / "run" / f"checkpoint-{number}"
        wrapped.save_pretrained(folder)
        for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).write_bytes(b"no weights")
        merged.append({name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()})
    (tmp_path / "run" / "training_args.bin").write_bytes(b"no weights")
    return tmp_path / "run", merged


@pytest.mark.parametrize(
    "body", ["BertForPreTraining", "BertModel"], ids=["a base with heads", "a base without the prefix"]
)
def test_adapters_are_ingredients_of_a_pool(tmp_path, body):
    """Each is its base with the adapter merged, under the network's names and without heads that the network does not have."""
    from soups.stores.collection import find_checkpoints, open_fitted

    run, merged = pool_of_adapters(tmp_path, body=body)
    found = find_checkpoints(run)
    assert sorted(found) == ["checkpoint-0", "checkpoint-1"]
    for number, expected in enumerate(merged):
        with open_fitted(found[f"checkpoint-{number}"], expected) as store:
            assert set(store) == set(expected)
            for name, tensor in expected.items():
                assert torch.allclose(store.read(name), tensor, rtol=1e-5, atol=1e-6), name
    assert len(find_checkpoints(run / "checkpoint-0")) == 1


def test_base_and_adapter_in_one_text(tmp_path):
    run, _ = pool_of_adapters(tmp_path, 1)
    (tmp_path / "base").rename(tmp_path / "base+v2")
    (tmp_path / "base").symlink_to(tmp_path / "base+v2")
    both, alone = f"{tmp_path / 'base+v2'}+{run / 'checkpoint-0'}", run / "checkpoint-0"
    with open_store(both) as one, open_store(alone) as other, open_store(tmp_path / "base", adapter=alone) as third:
        for name in one:
            assert torch.equal(one.read(name), other.read(name))
            assert torch.equal(one.read(name), third.read(name))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("somebody/llama-9", "LoRA adapter of 'somebody/llama-9', which is not on this machine"),
        (None, "does not say which model"),
    ],
)
def test_an_adapter_without_its_base_is_called_one(tmp_path, named, message):
    import json

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": named}))
    with pytest.raises(StorageError, match=message):
        open_store(tmp_path)


@pytest.mark.parametrize("by", ["merge", "configuration"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["saved head", "resized"])
def test_a_merged_folder_of_adapters_loads(tmp_path, by, tied, kind):
    """config.json follows what the adapters changed: a head of its own, a larger vocabulary."""
    from soups.merging import merge
    from soups.merging.mergekit import merge_configuration

    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    wanted = {}
    for number in range(2):
        torch.manual_seed(number)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if kind == "resized":
            model.resize_token_embeddings(22)
        saved = {"modules_to_save": ["lm_head"]} if kind == "saved head" else {}
        wrapped = trained(model, target_modules=QV, r=number + 1, **saved)
        wrapped.save_pretrained(tmp_path / f"a{number}", save_embedding_layers=kind == "resized")
        for name, tensor in wrapped.merge_and_unload().state_dict().items():
            wanted[name] = wanted.get(name, 0) + tensor / 2
    models = [f"{tmp_path / 'base'}+{tmp_path / f'a{number}'}" for number in range(2)]
    if by == "merge":
        merge("linear", models, out=tmp_path / "out")
    else:
        entries = [{"model": model, "parameters": {"weight": 1}} for model in models]
        merge_configuration({"merge_method": "linear", "models": entries}, tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in wanted.items():
        assert torch.allclose(loaded[name], expected, rtol=1e-5, atol=1e-6), name


def test_an_adapters_names_can_be_mapped(tmp_path):
    base = {"net.proj.weight": torch.zeros(3, 2)}
    save_file({"base_model.model.linear.lora_A.weight": torch.ones(1, 2), "base_model.model.linear.lora_B.weight": torch.ones(3, 1)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 2}')
    with pytest.raises(WeightsError, match=r"'linear.weight' among them.*rename"):
        open_store(base, adapter=tmp_path)
    with open_store(base, adapter=tmp_path, rename={r"\.linear\.": ".net.proj."}) as store:
        assert torch.equal(store.read("net.proj.weight"), torch.full((3, 2), 2.0))
