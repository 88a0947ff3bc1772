"""Every kind of LoRA adapter against PEFT's own `merge_and_unload`, on small modules and on transformers' models."""

import copy

import pytest
import torch
from torch import nn

from soups.errors import SoupError
from soups.stores import open_store

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def modules(**parts):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    return Model()


def mlp():
    return modules(lin0=nn.Linear(6, 9), drop=nn.Dropout(0.5), lin1=nn.Linear(9, 3))


def deep():
    blocks = nn.ModuleList([modules(lin0=nn.Linear(8, 8), lin1=nn.Linear(8, 8)) for _ in range(3)])
    return modules(lin0=nn.Linear(5, 8), layers=blocks, head=nn.Linear(8, 2))


def embedding_conv1d():
    return modules(emb=nn.Embedding(50, 5), conv1d=Conv1D(1, 5), lin=nn.Linear(1, 4))


def square_conv1d():
    return modules(c_attn=Conv1D(24, 8), c_proj=Conv1D(8, 8), mlp=modules(c_proj=Conv1D(8, 32)), head=nn.Linear(8, 11))


def embedding_in_the_path():
    return modules(embedding_block=modules(dense=nn.Linear(6, 6), out=nn.Linear(6, 4)), embeddings=nn.Embedding(7, 6))


def convolutions():
    return modules(
        one=nn.Conv1d(4, 6, 3), two=nn.Conv2d(4, 6, (3, 2)), three=nn.Conv3d(2, 3, (1, 2, 3)), point=nn.Conv2d(4, 6, 1),
        lin=nn.Linear(6, 6),
    )  # fmt: skip


def attention():
    return modules(mha=nn.MultiheadAttention(8, 2), lin=nn.Linear(8, 4))


def parameters():
    part = modules(lin=nn.Linear(6, 6))
    part.up = nn.Parameter(torch.randn(3, 10, 6))
    part.down = nn.Parameter(torch.randn(3, 6, 5))
    return modules(mlp=part, lin0=nn.Linear(4, 6))


ALL = {"target_modules": ["lin0", "lin1"]}
CASES = {
    "linear": (mlp, {"target_modules": ["lin0"]}),
    "two linears": (mlp, ALL),
    "alpha": (mlp, dict(**ALL, lora_alpha=32)),
    "alpha zero but for one": (mlp, dict(**ALL, lora_alpha=0, alpha_pattern={"lin1": 3})),
    "rank 1": (mlp, dict(**ALL, r=1)),
    "rank above the width": (mlp, dict(**ALL, r=12)),
    "dropout": (mlp, dict(**ALL, lora_dropout=0.3)),
    "regular expression": (mlp, {"target_modules": r"lin\d"}),
    "module saved": (mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "bias all": (mlp, dict(**ALL, bias="all")),
    "bias lora_only": (mlp, {"target_modules": ["lin1"], "bias": "lora_only"}),
    "lora_bias": (mlp, dict(**ALL, lora_bias=True)),
    "rank pattern": (mlp, dict(**ALL, rank_pattern={"lin0": 4})),
    "alpha pattern": (mlp, dict(**ALL, alpha_pattern={"lin1": 7})),
    "both patterns": (deep, dict(**ALL, rank_pattern={r"layers\.1\.lin0": 3}, alpha_pattern={r"^lin0": 5})),
    "rslora": (mlp, dict(**ALL, use_rslora=True, rank_pattern={"lin0": 3})),
    "dora": (mlp, dict(**ALL, use_dora=True)),
    "dora with rslora": (mlp, dict(**ALL, use_dora=True, use_rslora=True)),
    "fan_in_fan_out given wrongly": (mlp, dict(**ALL, fan_in_fan_out=True)),
    "some layers": (deep, {"target_modules": ["lin0"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "square linears": (deep, ALL),
    "excluded modules": (deep, dict(**ALL, exclude_modules=r"layers\.1\..*")),
    "embedding": (embedding_conv1d, {"target_modules": ["emb"]}),
    "Conv1D": (embedding_conv1d, {"target_modules": ["conv1d"]}),
    "embedding, Conv1D and linear": (embedding_conv1d, {"target_modules": ["emb", "conv1d", "lin"]}),
    "embedding by dora": (embedding_conv1d, {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    "square Conv1D beside a linear": (square_conv1d, {"target_modules": ["c_attn", "c_proj", "head"]}),
    "square Conv1D by dora": (square_conv1d, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding in the path": (embedding_in_the_path, {"target_modules": ["dense", "out"]}),
    "embedding and the path": (embedding_in_the_path, {"target_modules": ["dense", "embeddings"]}),
    "convolutions": (convolutions, {"target_modules": ["one", "two", "three", "point", "lin"]}),
    "convolutions by dora": (convolutions, {"target_modules": ["one", "two", "three", "point"], "use_dora": True}),
    "convolution, linear, saved": (convolutions, {"target_modules": ["two"], "modules_to_save": ["lin"]}),
    "multihead attention": (attention, {"target_modules": ["mha"]}),
    "attention and linear": (attention, {"target_modules": ["mha", "lin"], "lora_alpha": 3}),
    "stacked parameters": (parameters, {"target_modules": [], "target_parameters": ["mlp.up", "mlp.down"]}),
    "parameters and linear": (parameters, {"target_modules": ["lin0"], "target_parameters": ["mlp.down"]}),
    "parameter called weight": (mlp, {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    "pissa": (mlp, dict(**ALL, init_lora_weights="pissa")),
    "pissa on Conv1D": (square_conv1d, {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
    "olora": (mlp, dict(**ALL, init_lora_weights="olora")),
    "orthogonal": (mlp, dict(**ALL, r=4, init_lora_weights="orthogonal")),
    "gaussian": (mlp, dict(**ALL, init_lora_weights="gaussian")),
    "block diagonal": (
        lambda: modules(lin0=nn.Linear(8, 12), lin1=nn.Linear(12, 8)),
        dict(**ALL, r=4, use_bdlora=peft.tuners.lora.config.BdLoraConfig(["lin1"], ["lin0"], 2)),
    ),
}  # fmt: skip


def trained(model, **settings):
    """Wrap a model and move everything that PEFT trains."""
    settings = {"r": 2, "init_lora_weights": False, **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def check(base, adapter, merged):
    with open_store(base, adapter=adapter) as store:
        assert set(store) == set(merged)
        for name, expected in merged.items():
            found = store.read(name)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            scale = float(expected.abs().max()) if expected.is_floating_point() else 1
            assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=3e-6 * scale), name


@pytest.mark.parametrize("case", CASES)
def test_modules(tmp_path, case):
    build, settings = CASES[case]
    torch.manual_seed(0)
    model = build()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload().state_dict()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    check(base, tmp_path, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = trained(model, **ALL, use_dora=True)
    wrapped.save_pretrained(tmp_path)
    double = copy.deepcopy(wrapped).double().merge_and_unload().state_dict()
    with open_store(base, adapter=tmp_path) as store:
        for name, expected in double.items():
            found = store.read(name)
            assert found.dtype == dtype
            assert torch.allclose(
                found.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 9
            ), name


def grouped():
    return modules(conv=nn.Conv2d(4, 8, 3, groups=2), lin=nn.Linear(8, 8))


REFUSED = {
    "grouped convolution": (grouped, peft.LoraConfig(r=2, target_modules=["conv"]), "grouped convolution"),
    "aLoRA": (deep, peft.LoraConfig(r=2, **ALL, alora_invocation_tokens=[1]), "aLoRA"),
    "loftq": (mlp, peft.LoraConfig(r=2, **ALL), "LoftQ"),
    "pissa_niter": (mlp, peft.LoraConfig(r=2, **ALL, init_lora_weights="pissa_niter_4"), "random decomposition"),
    "IA3": (mlp, peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]), "IA3"),
    "LoHa": (mlp, peft.LoHaConfig(r=2, **ALL), "LOHA"),
    "LoKr": (mlp, peft.LoKrConfig(r=2, **ALL), "LOKR"),
    "OFT": (mlp, peft.OFTConfig(oft_block_size=3, **ALL), "OFT"),
    "BOFT": (mlp, peft.BOFTConfig(boft_block_size=3, boft_n_butterfly_factor=1, **ALL), "BOFT"),
    "VeRA": (mlp, peft.VeraConfig(r=2, target_modules=["lin0"]), "VERA"),
    "AdaLoRA": (mlp, peft.AdaLoraConfig(**ALL, total_step=10), "ADALORA"),
    "LN tuning": (mlp, peft.LNTuningConfig(target_modules=["lin0"]), "LN_TUNING"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_addition_cannot_express_is_refused_by_its_name(tmp_path, case):
    build, config, message = REFUSED[case]
    model = build()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, config)
    if case == "loftq":
        wrapped.peft_config["default"].init_lora_weights = "loftq"
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(SoupError, match=message):
        open_store(base, adapter=tmp_path)
