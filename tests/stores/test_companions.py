"""What a merged folder takes along from its base."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from soups.errors import StorageError
from soups.merging import merge
from soups.merging.mergekit import merge_configuration
from soups.stores.companions import carried_files

CARRIED = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "vocab.txt", "spiece.model", "chat_template.jinja", "modeling_x.py", "nested/layers.py", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "USE_POLICY.md", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "3_Normalize/state.txt", "additional_chat_templates/tool.jinja", "assets/mel.npz", "speech/config.json",
    "speech/model.safetensors", "dict.txt", "vocab.bpe", "tekken.json",
]  # fmt: skip
LEFT = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "trainer_state.json",
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "all_results.json", "eval_results.json", "train.log", "events.out.tfevents.1", "zero_to_fp32.py", "latest",
    "global_step100/x.pt", "checkpoint-500/model.safetensors", "checkpoint-500/config.json", "runs/a/events", "wandb/x.json",
    ".git/config", ".cache/x.json", "__pycache__/m.pyc", "onnx/model.onnx", "openvino/model.xml", "README.md", "picture.png",
    "mergekit_config.yml", "adapter_config.json", "adapter_model.safetensors", "best/model.safetensors", "best/config.json",
    "old/pytorch_model.bin", "adapter/adapter_config.json", ".hidden",
]  # fmt: skip


def folder_of_everything(path):
    for name in [*CARRIED, *LEFT]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    for place, kind in ((".", "llama"), ("best", "llama"), ("speech", "codec"), ("checkpoint-500", "llama")):
        (path / place / "config.json").write_text(json.dumps({"model_type": kind}))
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (path / "modules.json").write_text(json.dumps(modules))
    return path


def test_what_belongs_to_the_model(tmp_path):
    found = carried_files(folder_of_everything(tmp_path))
    assert sorted(found) == sorted(CARRIED)
    assert found["2_Dense/config.json"] == tmp_path / "2_Dense/config.json"
    assert list(carried_files(tmp_path, ["vocab.txt", "absent"])) == ["vocab.txt"]
    assert carried_files(tmp_path / "nowhere") == {}


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(StorageError, match="leads out of its folder"):
        carried_files(tmp_path / "model")


@pytest.mark.parametrize("by", ["merge", "configuration"])
def test_a_merged_folder_holds_them(tmp_path, by):
    weights = {"w": torch.ones(2)}
    for name in ("a", "b"):
        folder_of_everything(tmp_path / name)
        for index in (tmp_path / name).glob("*.index.json"):
            index.unlink()
        save_file(weights, tmp_path / name / "model.safetensors")
    places, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    if by == "merge":
        merge("linear", places, out=out)
    else:
        models = [{"model": str(place), "parameters": {"weight": 1}} for place in places]
        merge_configuration({"merge_method": "linear", "models": models}, out)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written - {"README.md", "mergekit_config.yml"} == {*CARRIED, "model.safetensors"}
    assert (out / "2_Dense/model.safetensors").read_text() == "2_Dense/model.safetensors"


def test_a_model_of_remote_code_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=20,
    )
    config.auto_map = {"AutoModel": "own_code.OwnModel"}
    for name in ("a", "b"):
        transformers.BertModel(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "own_code.py").write_text(
            "from transformers import BertModel\nfrom .own_part import ANSWER\n\n\nclass OwnModel(BertModel):\n    answer = ANSWER\n"
        )
        (tmp_path / name / "own_part.py").write_text("ANSWER = 42\n")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**settings, "auto_map": config.auto_map}))
    merge("linear", [tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")
    before = set(sys.modules)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.answer == 42
    for name in set(sys.modules) - before:
        if "own_code" in name or "own_part" in name:
            del sys.modules[name]


def test_a_sentence_transformer_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Dense, Pooling, Transformer

    (tmp_path / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=7
    )
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        transformers.BertModel(config).save_pretrained(tmp_path / f"{name}_body")
        transformers.BertTokenizerFast(str(tmp_path / "words.txt")).save_pretrained(tmp_path / f"{name}_body")
        body = Transformer(str(tmp_path / f"{name}_body"))
        dense = Dense(in_features=8, out_features=3)
        sentence_transformers.SentenceTransformer(modules=[body, Pooling(8), dense]).save(str(tmp_path / name))
    merge("linear", [tmp_path / "a", tmp_path / "b"], out=tmp_path / "out")
    made = sentence_transformers.SentenceTransformer(str(tmp_path / "out"))
    parts = [sentence_transformers.SentenceTransformer(str(tmp_path / name)) for name in ("a", "b")]
    assert made.encode(["a b"]).shape == (1, 3)
    for name, tensor in made[0].state_dict().items():
        mean = (parts[0][0].state_dict()[name].double() + parts[1][0].state_dict()[name].double()) / 2
        assert torch.allclose(tensor.double(), mean), name
    assert torch.equal(made[2].state_dict()["linear.weight"], parts[0][2].state_dict()["linear.weight"])
