"""One vocabulary from several, modules of several towers, chat templates; against mergekit: test_mergekit_parity.py."""

import importlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from soups.errors import ConfigError, SoupError, WeightsError
from soups.merging.mergekit import describe_plan, merge_configuration
from soups.merging.mergekit.chat_templates import CHAT_TEMPLATES
from soups.merging.mergekit.modules import split_modules
from soups.merging.mergekit.tokens import read_vocabulary
from soups.stores import open_store, write_safetensors

spec = importlib.util.spec_from_file_location("merging_llama_vocabulary", Path(__file__).parent / "llama.py")
llama = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = llama
spec.loader.exec_module(llama)
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def root(tmp_path):
    return llama.write_vocabularies(tmp_path / "models")


def text(root, more="tokenizer: {source: union}\n"):
    return (
        f"models:\n- {{model: {root}/m1, parameters: {{weight: 1}}}}\n- {{model: {root}/m2, parameters: {{weight: 3}}}}\n"
        f"merge_method: linear\n{more}"
    )


def rows(folder):
    ids = read_vocabulary(folder).ids
    with open_store(folder) as store:
        embedding = store.read(EMBED)
    return {token: embedding[number] for token, number in ids.items()}


def test_each_token_is_merged_with_itself(root, tmp_path):
    merge_configuration(text(root), tmp_path / "out")
    one, two, out = rows(root / "m1"), rows(root / "m2"), rows(tmp_path / "out")
    assert list(out) == ["<unk>", "cat", "the", "sat", "dog", "<s>", "<one>", "bird", "<two>"]
    for token, row in out.items():
        # A token that one of the models lacks is the other's alone.
        expected = (one.get(token, two.get(token)) + 3 * two.get(token, one.get(token))) / 4
        assert torch.allclose(row, expected, atol=1e-6), token
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {entry["content"]: entry for entry in content["added_tokens"]}
    assert added["<two>"]["special"] and not added["bird"]["special"] and added["<two>"]["id"] == 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 9


def test_the_written_tokenizer_works(root, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    merge_configuration(text(root), tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("the bird sat <two>").tokens == ["the", "bird", "sat", "<two>"]
    assert tokenizer.get_vocab_size() == 9


def test_chunks_and_threads_leave_no_trace(root, tmp_path):
    more = "tokenizer: {source: union, pad_to_multiple_of: 64}\n"
    whole = merge_configuration(text(root, more))
    cut = merge_configuration(text(root, more), threads=3, chunk=1)
    assert whole[EMBED].shape == (64, 64)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    mean = whole[EMBED][:9].mean(0)
    assert torch.allclose(whole[EMBED][9:], mean.expand(55, -1), atol=1e-6)


def test_pieces_with_scores(root):
    content = {
        "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": [{"id": 2, "content": "c"}],
    }
    (root / "m1" / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(root / "m1").ids == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("tokenizer: {source: union, tokens: {cat: {source: /elsewhere, force: true}}}\n", "not among the models"),
        ("tokenizer: {tokens: {cat: {force: true, source: {kind: model_token, model: ROOT/m1, token: dogg}}}}\n", "no token 'dogg'; did you mean 'dog'"),
        ("tokenizer: {tokens: {cat: {force: true, source: {kind: model_token, model: ROOT/m1, token_id: 99}}}}\n", "ids 0 to 6, not 99"),
        ("tokenizer: {tokens: {cat: {source: {kind: model_token, model: ROOT/m1}}}}\n", "exactly one of token and token_id"),
        ("tokenizer: {pad_to_multiple_of: 0}\n", "greater than or equal to 1"),
        ("tokenizer_source: base\n", "there is no base_model"),
        ("tokenizer_source: nowhere\n", "neither 'union', nor 'base', nor a model folder"),
    ],
)  # fmt: skip
def test_mistakes(root, tmp_path, more, message):
    with pytest.raises(SoupError, match=message):
        merge_configuration(text(root, more.replace("ROOT", str(root))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_are_not_there_or_not_the_models(root):
    (root / "m2" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="m2 has no tokenizer, which is needed"):
        merge_configuration(text(root))
    llama.write_tokenizer(root / "m2", [f"t{i}" for i in range(20)])
    with pytest.raises(WeightsError, match="has 7 rows, but its tokenizer has ids up to 19"):
        merge_configuration(text(root))
    (root / "m2" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer of the Hugging Face format"):
        merge_configuration(text(root))


def sentencepiece(folder, sentence, size):
    """Leave a folder with a sentencepiece model in the place of its tokenizer.json; return its vocabulary's size."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    made, words = io.BytesIO(), sentence.split()
    sentences = [" ".join(words[start : start + 4]) for start in range(len(words) - 3)] * 30
    trainer.train(
        sentence_iterator=iter(sentences), model_writer=made, vocab_size=size, hard_vocab_limit=False,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    size = len(read_vocabulary(folder).ids)
    write_safetensors(folder / "model.safetensors", llama.weights(len(words), layers=1, vocabulary=size))
    return size


def test_sentencepiece_models_are_brought_together(root, tmp_path):
    sentencepiece(root / "m1", "the cat sat on the mat and ate a rat", 50)
    sentencepiece(root / "m2", "one bird sang over the old house at dawn today", 60)
    merge_configuration(text(root), tmp_path / "out")
    one, two, out = rows(root / "m1"), rows(root / "m2"), rows(tmp_path / "out")
    assert out.keys() == one.keys() | two.keys() and len(out) > max(len(one), len(two))
    assert one.keys() & two.keys() and one.keys() - two.keys()
    for token, row in out.items():
        expected = (one.get(token, two.get(token)) + 3 * two.get(token, one.get(token))) / 4
        assert torch.allclose(row, expected, atol=1e-6), token
    assert not (tmp_path / "out" / "tokenizer.model").exists()  # it knows nothing of the new tokens
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(out)


def test_one_sentencepiece_model_for_all_is_copied(root, tmp_path):
    for name in ("m1", "m2"):
        sentencepiece(root / name, "the cat sat on the mat and ate a rat", 50)
    merge_configuration(text(root), tmp_path / "out")
    copied = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert copied == (root / "m1" / "tokenizer.model").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_older_tokenizer_that_cannot_be_converted(root):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "m2" / name).unlink()
    (root / "m2" / "tokenizer.model").write_bytes(b"not sentencepiece")
    with pytest.raises(ConfigError, match=r"tokenizer\.model.*converted to tokenizer\.json"):
        merge_configuration(text(root))


def test_embeddings_of_other_lengths_are_an_error_unless_they_may_be_cut(root):
    write_safetensors(root / "m2" / "model.safetensors", llama.weights(2, layers=1, vocabulary=5))
    with pytest.raises(WeightsError, match=r"mis-shaped.*source: union"):
        merge_configuration(text(root, ""))
    weights = merge_configuration(text(root, ""), truncate_embeddings=True)
    with open_store(root / "m1") as one, open_store(root / "m2") as two:
        expected = (one.read(EMBED, slice(0, 5)) + 3 * two.read(EMBED)) / 4
    assert weights[EMBED].shape == (5, 64) and torch.allclose(weights[EMBED], expected, atol=1e-6)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
WRITTEN = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_chat_templates(root, tmp_path, name):
    jinja2 = pytest.importorskip("jinja2")
    merge_configuration(text(root, f"chat_template: {name}\n"), tmp_path / "out", truncate_embeddings=True)
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(written)
    rendered = template.render(messages=CONVERSATION, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert rendered == WRITTEN[name]


@pytest.fixture
def towers(tmp_path):
    for number in (1, 2, 3):
        generator = torch.Generator().manual_seed(number)
        names = [
            "model.visual.blocks.0.w", "model.visual.blocks.1.w", "model.visual.merger.w", "model.language_model.layers.0.w",
            "model.language_model.layers.1.w", "model.language_model.layers.2.w", "lm_head.weight",
        ]  # fmt: skip
        weights = {name: torch.randn(3, 3, generator=generator) for name in names}
        write_safetensors(tmp_path / f"{number}.safetensors", weights)
    return tmp_path


def test_modules_of_several_towers(towers):
    config = f"""
merge_method: linear
modules:
  vision_tower:
    models: [{{model: {towers}/1.safetensors, parameters: {{weight: 1}}}}]
  multi_modal_projector:
    models: [{{model: {towers}/2.safetensors}}]
    parameters: {{weight: 2, normalize: false}}
  text_decoder:
    slices:
      - sources:
          - {{model: {towers}/1.safetensors, layer_range: [0, 2], parameters: {{weight: [0, 1]}}}}
          - {{model: {towers}/3.safetensors, layer_range: [1, 3], parameters: {{weight: 1}}}}
"""
    warnings = []
    merged = merge_configuration(config, warn=warnings.append)
    one, two, three = (open_store(towers / f"{i}.safetensors").load() for i in (1, 2, 3))
    for layer in (0, 1):
        name = f"model.visual.blocks.{layer}.w"
        assert torch.equal(merged[name], one[name])
    assert torch.equal(merged["model.visual.merger.w"], 2 * two["model.visual.merger.w"])
    layers = "model.language_model.layers."
    assert torch.equal(merged[f"{layers}0.w"], three[f"{layers}1.w"])
    assert torch.allclose(merged[f"{layers}1.w"], (one[f"{layers}1.w"] + three[f"{layers}2.w"]) / 2)
    assert f"{layers}2.w" not in merged and "lm_head.weight" in merged
    assert "text_decoder has 2 layers" in warnings[0]


def test_modules_that_leave_tensors_out(towers):
    config = f"merge_method: passthrough\nmodules: {{visual: {{models: [{{model: {towers}/1.safetensors}}]}}}}\n"
    with pytest.raises(ConfigError, match=r"4 tensors of .* are in none of the modules"):
        merge_configuration(config)
    rest = config.replace("}]}}", "}]}, default: {models: [{model: TWO}]}}").replace("TWO", f"{towers}/2.safetensors")
    assert len(merge_configuration(rest)) == 7
    assert split_modules(["encoder.w", "decoder.w"], ["decoder", "encoder"]) == {
        "encoder.w": "encoder",
        "decoder.w": "decoder",
    }


def test_a_dry_run_of_several_documents(towers):
    config = (
        f"name: first\nmerge_method: linear\nmodels: [{{model: {towers}/1.safetensors}}, {{model: {towers}/2.safetensors}}]\n"
        "parameters: {weight: 1}\n---\n"
        f"merge_method: slerp\nbase_model: {towers}/3.safetensors\nmodels: [{{model: first}}]\nparameters: {{t: 0.5}}\n"
    )
    _, plans = describe_plan(config)
    assert [plan.plan.bytes_to_write for plan in plans] == [7 * 36] * 2
    assert [plan.plan.bytes_to_read for plan in plans] == [2 * 7 * 36] * 2
    with pytest.raises(WeightsError, match="only planned"):
        plans[1].plan.jobs[0].models[0].store.read("lm_head.weight")
