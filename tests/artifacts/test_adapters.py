"""Adapters merged into one, against PEFT's add_weighted_adapter and against the products; and adapters from full fine-tunes."""

import json

import pytest
import torch
from torch import nn

from soups.artifacts import extract_adapter, merge_adapters
from soups.errors import ConfigError, StorageError, WeightsError
from soups.stores import open_store
from tests.stores.test_lora_against_peft import modules
from tests.stores.test_lora_on_transformers import gpt2, llama, mixtral, opt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def network():
    torch.manual_seed(0)
    return modules(lin=nn.Linear(7, 9), other=nn.Linear(9, 5), conv=nn.Conv2d(3, 4, 2), emb=nn.Embedding(11, 7))


SETTINGS = [
    {"r": 3, "lora_alpha": 6, "target_modules": ["lin", "other", "conv", "emb"]},
    {"r": 3, "lora_alpha": 2, "target_modules": ["lin", "conv", "emb"], "use_rslora": True},
]


def adapters(tmp_path, settings=SETTINGS, build=network):
    """Write one adapter for each setting; return the base, the folders, and the changes by tensor."""
    base = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    folders, changes = [], []
    for number, one in enumerate(settings):
        model = build()
        torch.manual_seed(10 + number)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **one))
        folder = tmp_path / f"adapter{number}"
        wrapped.save_pretrained(folder)
        folders.append(folder)
        merged = wrapped.merge_and_unload().state_dict()
        changes.append({name: merged[name].double() - base[name].double() for name in base})
    return base, folders, changes


def applied(base, folder):
    """Return what PEFT makes of the written folder, and check that ours reads the same."""
    model = network()
    loaded = peft.PeftModel.from_pretrained(model, folder)
    merged = {name: tensor.double() for name, tensor in loaded.merge_and_unload().state_dict().items()}
    with open_store(base, adapter=folder) as store:
        for name in base:
            assert torch.allclose(store.read(name).double(), merged[name], atol=1e-6), name
    return {name: merged[name] - base[name].double() for name in base}


def test_cat_is_exact(tmp_path):
    base, folders, changes = adapters(tmp_path)
    merge_adapters(folders, method="cat", weights=[0.7, -0.4], out=tmp_path / "out")
    found = applied(base, tmp_path / "out")
    for name in base:
        assert torch.allclose(found[name], 0.7 * changes[0][name] - 0.4 * changes[1][name], atol=1e-6), name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert config["rank_pattern"] == {"^other": 3}


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_svd_keeps_the_best_product_of_a_rank(tmp_path, rank):
    base, folders, changes = adapters(tmp_path)
    merge_adapters(folders, weights=[1, 1], rank=rank, out=tmp_path / "out")
    found = applied(base, tmp_path / "out")
    for name in ("lin.weight", "other.weight", "emb.weight", "conv.weight"):
        wanted = (changes[0][name] + changes[1][name]).flatten(1)
        error = (found[name].flatten(1) - wanted).square().sum().sqrt()
        least = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt()
        assert abs(float(error - least)) < 1e-5, name


def test_uniform_weights_by_default(tmp_path):
    base, folders, changes = adapters(tmp_path)
    merge_adapters(folders, method="cat", out=tmp_path / "out")
    found = applied(base, tmp_path / "out")
    assert torch.allclose(found["lin.weight"], (changes[0]["lin.weight"] + changes[1]["lin.weight"]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "density"),
    [
        ("linear", None), ("cat", None), ("svd", None), ("ties", 0.4), ("ties_svd", 0.4), ("magnitude_prune", 0.3),
        ("magnitude_prune_svd", 0.3), ("dare_linear", 1.0), ("dare_ties", 1.0), ("dare_ties_svd", 1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("weights", [[0.6, 0.9], [1.0, -0.5]])
def test_against_peft(tmp_path, method, density, weights):
    """Modules of two adapters with other scales, and one module that only the first has."""
    settings = [
        {**one, "target_modules": [name for name in one["target_modules"] if name != "conv"]} for one in SETTINGS
    ]
    base, folders, _ = adapters(tmp_path, settings)
    rank = {"rank": 2} if method.endswith("svd") else {}
    more = {"density": density} if density is not None else {}
    merge_adapters(folders, method=method, weights=weights, out=tmp_path / "out", **rank, **more)
    found = applied(base, tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(network(), folders[0], adapter_name="a")
    wrapped.load_adapter(folders[1], adapter_name="b")
    options = {"svd_rank": 2} if rank else {}
    wrapped.add_weighted_adapter(["a", "b"], weights, "c", combination_type=method, **options, **more)
    wrapped.set_adapter("c")
    wanted = wrapped.merge_and_unload(adapter_names=["c"]).state_dict()
    for name in base:
        assert torch.allclose(found[name] + base[name], wanted[name].double(), atol=2e-5), name


def test_dare_is_unbiased_and_repeatable(tmp_path):
    base, folders, changes = adapters(tmp_path, SETTINGS[:1])
    total = torch.zeros_like(changes[0]["lin.weight"])
    for seed in range(60):
        out = merge_adapters(
            folders, method="dare_linear_svd", density=0.7, seed=seed, rank=7, out=tmp_path / f"{seed}"
        )
        with open_store(base, adapter=out) as store:
            total += (store.read("lin.weight") - base["lin.weight"]) / 60
    assert torch.allclose(total, changes[0]["lin.weight"], atol=0.6 * float(changes[0]["lin.weight"].abs().max()))
    assert abs(float((total * changes[0]["lin.weight"]).sum() / changes[0]["lin.weight"].square().sum()) - 1) < 0.1
    again = merge_adapters(folders, method="dare_linear_svd", density=0.7, seed=3, rank=7, out=tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "3" / "adapter_model.safetensors"
    ).read_bytes()


def test_knots_of_one_task_is_the_task(tmp_path):
    """With every element kept, one task in its own basis is the task itself."""
    base, folders, changes = adapters(tmp_path, SETTINGS[:1])
    merge_adapters(folders, method="knots", density=1.0, out=tmp_path / "out")
    found = applied(base, tmp_path / "out")
    for name in ("lin.weight", "other.weight"):
        assert torch.allclose(found[name], changes[0][name], atol=1e-5), name


def test_merging_equals_merging_the_models(tmp_path):
    """Without a limit to the rank, the adapter of TIES over products is TIES of the merged models."""
    from soups.merging import merge

    base, folders, changes = adapters(tmp_path, [SETTINGS[0]] * 2)
    merge_adapters(folders, method="ties_svd", weights=[1, 1], density=0.3, rank=99, out=tmp_path / "out")
    models = [{name: (base[name] + change[name]).float() for name in base} for change in changes]
    wanted = merge("ties.peft", models, base=base, density=0.3, weight=[1, 1])
    found = applied(base, tmp_path / "out")
    for name in ("lin.weight", "other.weight"):
        assert torch.allclose(found[name] + base[name], wanted[name].double(), atol=1e-5), name


def test_modules_trained_in_full(tmp_path):
    settings = [{"r": 2, "target_modules": ["lin"], "modules_to_save": ["other"]}, {"r": 2, "target_modules": ["lin"]}]
    base, folders, changes = adapters(tmp_path, settings)
    merge_adapters(folders, out=tmp_path / "out")
    assert torch.allclose(applied(base, tmp_path / "out")["other.weight"], changes[0]["other.weight"], atol=1e-6)
    base, folders, _ = adapters(tmp_path / "b", settings[:1] * 2)
    tensors = open_store(folders[1] / "adapter_model.safetensors").load()
    tensors["base_model.model.other.bias"] += 1
    from safetensors.torch import save_file

    save_file(tensors, folders[1] / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"trained 'other\.bias' in full"):
        merge_adapters(folders, out=tmp_path / "no")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "mean"}, ConfigError, "unknown"),
        ({"weights": [1]}, ConfigError, "2 adapters and 1 weights"),
        ({"method": "cat", "rank": 4}, ConfigError, "does not go with 'cat'"),
        ({"method": "linear", "density": 0.5}, ConfigError, "keeps every element"),
        ({"method": "ties", "density": 2}, ConfigError, "no share"),
        ({"method": "knots", "weights": [1, 2]}, ConfigError, "no weights"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, error, message):
    _, folders, _ = adapters(tmp_path)
    with pytest.raises(error, match=message):
        merge_adapters(folders, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_is_no_product_is_refused(tmp_path):
    dora = {"r": 2, "target_modules": ["lin"], "use_dora": True}
    _, folders, _ = adapters(tmp_path, [SETTINGS[0], dora])
    with pytest.raises(StorageError, match="DoRA"):
        merge_adapters(folders, out=tmp_path / "out")
    _, folders, _ = adapters(tmp_path / "b", [SETTINGS[0], {**SETTINGS[0], "r": 4}])
    with pytest.raises(WeightsError, match="needs one rank"):
        merge_adapters(folders, method="linear", out=tmp_path / "out")
    merge_adapters(folders, out=tmp_path / "out")
    with pytest.raises(StorageError, match="already"):
        merge_adapters(folders, out=tmp_path / "out")
    merge_adapters(folders, out=tmp_path / "out", overwrite=True, rank=1)


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "opt": opt,
    "mixtral": mixtral,
}


@pytest.mark.parametrize("kind", MODELS)
def test_extraction_round_trips(tmp_path, kind):
    """A change of rank two in every matrix, other changes in norms, biases, embeddings and heads; through PEFT and through ours."""
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "lm_head" in name or "wte" in name or "wpe" in name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.ndim >= 2:
                rows = torch.randn(*parameter.shape[:-1], 2) @ torch.randn(
                    *parameter.shape[:-2], 2, parameter.shape[-1]
                )
                parameter += 0.1 * rows
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    rank = 4 if kind == "mixtral" else 2
    found = extract_adapter(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=rank)
    assert min(found.kept.values()) > 1 - 1e-6
    assert set(found.ranks.values()) <= {rank, 3}
    wanted = model.state_dict()
    with open_store(tmp_path / "base", adapter=tmp_path / "adapter") as ours, open_store(tmp_path / "tuned") as tuned:
        for name in tuned:
            assert torch.allclose(ours.read(name), tuned.read(name), atol=1e-5), name
    base = type(model).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, expected in wanted.items():
        assert torch.allclose(merged[name], expected, atol=1e-5), name


def test_energy_decides_ranks(tmp_path):
    base = {"a.weight": torch.zeros(6, 6), "b.weight": torch.zeros(6, 6), "norm.weight": torch.ones(3)}
    tuned = dict(base)
    tuned["a.weight"] = torch.diag(torch.tensor([3.0, 1.0, 0, 0, 0, 0]))
    tuned["b.weight"] = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0, 0, 0]))
    found = extract_adapter(tuned, base, tmp_path / "out", energy=0.9)
    assert found.ranks == {"a": 1, "b": 3}
    assert found.kept["a"] == pytest.approx(0.9)
    assert extract_adapter(tuned, base, tmp_path / "out2", energy=0.95).ranks == {"a": 2, "b": 3}
    assert extract_adapter(tuned, base, tmp_path / "out3", energy=1, rank=2).kept["b"] == pytest.approx(2 / 3)
    with open_store(base, adapter=tmp_path / "out2") as store:
        assert torch.allclose(store.read("a.weight"), tuned["a.weight"], atol=1e-6)
    with pytest.raises(WeightsError, match="do not differ"):
        extract_adapter(base, base, tmp_path / "none", rank=1)
    with pytest.raises(ConfigError, match="how much to keep"):
        extract_adapter(tuned, base, tmp_path / "none")
    with pytest.raises(ConfigError, match="at most 1"):
        extract_adapter(tuned, base, tmp_path / "none", energy=1.5)


def test_commands(tmp_path):
    from typer.testing import CliRunner

    from soups.cli import app

    base, folders, changes = adapters(tmp_path)
    run = CliRunner().invoke(
        app,
        [
            "merge-lora",
            *map(str, folders),
            "--out",
            str(tmp_path / "out"),
            "--method",
            "cat",
            "--weight",
            "1",
            "--weight",
            "2",
        ],
    )
    assert run.exit_code == 0, run.output
    found = applied(base, tmp_path / "out")
    assert torch.allclose(found["lin.weight"], changes[0]["lin.weight"] + 2 * changes[1]["lin.weight"], atol=1e-6)
    from safetensors.torch import save_file

    tuned = {name: (base[name] + changes[0][name]).float() for name in base}
    for name, weights in (("base", base), ("tuned", tuned)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    places = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors", "extracted")]
    run = CliRunner().invoke(app, ["extract-lora", *places, "--rank", "3"])
    assert run.exit_code == 0, run.output
    assert "ranks 3 to 3, at least 100.0%" in run.output
    with open_store(base, adapter=tmp_path / "extracted") as store:
        assert torch.allclose(store.read("other.weight"), tuned["other.weight"], atol=1e-5)
    run = CliRunner().invoke(app, ["extract-lora", *places, "--rank", "3"])
    assert run.exit_code == 1
    assert "already" in run.output
