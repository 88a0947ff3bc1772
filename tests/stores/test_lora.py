import json

import pytest
import torch
from safetensors.torch import save_file

from soups.errors import StorageError, WeightsError
from soups.stores import open_store

BASE = {"layer.q.weight": torch.randn(6, 4), "layer.k.weight": torch.randn(6, 4), "head.weight": torch.randn(2, 6)}
A, B = torch.randn(2, 4), torch.randn(6, 2)


def adapter(path, tensors=None, **config):
    path.mkdir()
    tensors = tensors or {"layer.q.lora_A.weight": A, "layer.q.lora_B.weight": B}
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}))
    return path


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 4), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"q": 2}}, 1), ({"lora_alpha": 0}, 0)],
)
def test_the_product_is_added_to_the_base(tmp_path, config, scale):
    with open_store(BASE, adapter=adapter(tmp_path / "a", **config)) as store:
        expected = BASE["layer.q.weight"] + scale * B @ A
        assert torch.allclose(store.read("layer.q.weight"), expected, atol=1e-5)
        assert torch.equal(store.read("layer.q.weight", slice(2, 4)), store.read("layer.q.weight")[2:4])
        assert torch.equal(store.read("layer.k.weight"), BASE["layer.k.weight"])
        assert store.changed() == ["layer.q.weight"]


def test_transposed_layers_and_saved_modules(tmp_path):
    tensors = {
        "layer.q.lora_A.weight": torch.randn(2, 6),
        "layer.q.lora_B.weight": torch.randn(4, 2),
        "head.modules_to_save.weight": torch.ones(2, 6),
    }
    with open_store(BASE, adapter=adapter(tmp_path / "a", tensors, fan_in_fan_out=True)) as store:
        product = tensors["layer.q.lora_B.weight"] @ tensors["layer.q.lora_A.weight"]
        assert torch.allclose(store.read("layer.q.weight"), BASE["layer.q.weight"] + 4 * product.T, atol=1e-5)
        assert torch.equal(store.read("head.weight"), torch.ones(2, 6))


def test_against_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Conv2d(3, 5, 3), torch.nn.Embedding(7, 4))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "a")
    merged = wrapped.merge_and_unload().state_dict()
    with open_store(base, adapter=tmp_path / "a") as store:
        for name, tensor in merged.items():
            assert torch.allclose(store.read(name), tensor, atol=1e-5), name


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {}, WeightsError, "does not have"),
        ({"layer.q.lora_A.weight": A}, {}, WeightsError, "without"),
        ({"layer.q.lora_A.weight": A, "layer.q.lora_B.weight": torch.ones(5, 2)}, {}, WeightsError, "another model"),
        (None, {"use_dora": True}, WeightsError, "no magnitude"),
        (None, {"r": 4}, WeightsError, "rank 2, and the configuration says 4"),
        (None, {"future_option": 3}, StorageError, "future_option"),
        (None, {"init_lora_weights": "corda"}, StorageError, "CorDA"),
        (None, {"layer_replication": [[0, 2]]}, StorageError, "another depth"),
        (
            {"layer.q.lora_A.weight": A, "layer.q.lora_B.weight": B, "layer.q.lora_diag": torch.ones(2)},
            {},
            StorageError,
            "lora_diag",
        ),
        ({"head.weight": torch.ones(3, 6)}, {}, WeightsError, "resized"),
        ({"nowhere.weight": torch.ones(3, 6)}, {}, WeightsError, "does not have"),
        (None, {"peft_type": "PREFIX_TUNING"}, StorageError, "changes no weights"),
        (None, {"peft_type": "IA3"}, StorageError, "IA3"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, tensors, config, error, message):
    with pytest.raises(error, match=message):
        open_store(BASE, adapter=adapter(tmp_path / "a", tensors, **config))
