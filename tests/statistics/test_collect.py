"""Collected statistics against derivations that use no hook: recomputed inputs, and autograd example by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from soups.errors import ConfigError, DataError, StorageError, WeightsError
from soups.statistics import Statistics, collect, sizes
from tests.statistics.networks import NAMES, made, padded


def logits(module: nn.Module, one: Any) -> Tensor:
    if isinstance(one, dict):
        return module(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
    return module(one[0])


def batched(data: list[Any], size: int) -> list[Any]:
    parts = [data[first : first + size] for first in range(0, len(data), size)]
    if isinstance(data[0], dict):
        return [padded(part) for part in parts]
    return [[torch.cat([one[0] for one in part]), torch.cat([one[1] for one in part])] for part in parts]


def same(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer_kind", [nn.Linear])
def test_gram_matrices_of_linear_layers(name: str, layer_kind: type[nn.Module]) -> None:
    """By patching `functional.linear` instead of hooks: it receives every input, that of attention's projections too."""
    module, data = made(name)
    sums: dict[int, Tensor] = {}
    original = functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        sums[id(weight)] = sums.get(id(weight), 0) + rows.T @ rows
        return original(x, weight, bias)

    functional.linear = linear
    try:
        with torch.no_grad():
            for one in data:  # an example alone has no padding
                logits(module, one)
    finally:
        functional.linear = original
    found = collect(module, batched(data, 4), ["gram"])
    checked = 0
    for prefix, layer in module.named_modules():
        if isinstance(layer, layer_kind) and id(layer.weight) in sums and not prefix.endswith("out_proj"):
            assert same(found[f"gram/{prefix}.weight"], sums[id(layer.weight)]), prefix
            checked += 1
    assert checked >= {"mlp": 2, "conv": 1, "vit": 2, "bert": 8, "gpt2": 1, "llama": 8}[name]


def test_the_projections_of_multihead_attention() -> None:
    module, data = made("vit")
    found = collect(module, batched(data, 4), ["gram"])
    x = torch.cat([one[0] for one in data])
    layer = module.encoder.layers[0]
    attention = layer.self_attn
    with torch.no_grad():
        inputs = layer.norm1(module.patch(x))
        q, k, v = functional.linear(inputs, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        weights = ((q @ k.transpose(-1, -2)) / 2).softmax(-1)
        heads = (weights @ v).transpose(1, 2).flatten(2)
    for name, rows in (("in_proj_weight", inputs), ("out_proj.weight", heads)):
        rows = rows.reshape(-1, 8)
        assert same(found[f"gram/encoder.layers.0.self_attn.{name}"], rows.T @ rows)
        assert found.count(f"gram/encoder.layers.0.self_attn.{name}") == 30


def test_convolutions_by_shifting_the_image() -> None:
    """Patches are gathered by plain indexing of the padded image, and multiplied with the weight they give the output."""
    module, data = made("conv")
    x = torch.cat([one[0] for one in data])
    found = collect(module, batched(data, 6), ["gram"])
    with torch.no_grad():
        for number, layer in enumerate(module.body):
            if isinstance(layer, nn.Conv2d):
                mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
                size = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
                wide = functional.pad(x, size, mode=mode)
                out = layer(x)
                rows = torch.stack([
                    wide[:, :, i * layer.stride[0] + a * layer.dilation[0], j * layer.stride[1] + b * layer.dilation[1]]
                    for i in range(out.shape[2]) for j in range(out.shape[3])
                    for a in range(layer.kernel_size[0]) for b in range(layer.kernel_size[1])
                ])  # fmt: skip
                taps = layer.kernel_size[0] * layer.kernel_size[1]
                patches = rows.reshape(-1, taps, len(x), x.shape[1]).permute(2, 0, 3, 1)  # (B, places, channels, taps)
                groups = patches.reshape(-1, layer.groups, x.shape[1] // layer.groups * taps)
                expected = torch.einsum("rgi,rgj->gij", groups, groups)
                made_rows = groups[:, 0] @ layer.weight[: layer.out_channels // layer.groups].flatten(1).T
                plain = out - (0 if layer.bias is None else layer.bias[:, None, None])
                group = plain[:, : layer.out_channels // layer.groups].flatten(2).transpose(1, 2)
                assert same(made_rows.reshape(group.shape), group)
                gram = found[f"gram/body.{number}.weight"]
                assert same(gram, expected[0] if layer.groups == 1 else expected), number
                assert found.count(f"gram/body.{number}.weight") == len(groups)
            x = layer(x)


def test_a_transposed_weight_of_gpt2() -> None:
    module, data = made("gpt2")
    found = collect(module, batched(data, 3), ["gram", "second_moment", "frequency"])
    block, total, normal = module.transformer.h[0], torch.zeros(8, 8).double(), torch.zeros(8).double()
    with torch.no_grad():
        for one in data:
            places = torch.arange(one["input_ids"].shape[1])
            x = module.transformer.wte(one["input_ids"])[0] + module.transformer.wpe(places)
            centred = x - x.mean(-1, keepdim=True)
            normalised = centred / (x.var(-1, unbiased=False, keepdim=True) + block.ln_1.eps).sqrt()
            normal += normalised.square().sum(0)
            rows = normalised * block.ln_1.weight + block.ln_1.bias
            total += rows.T @ rows
    assert same(found["gram/transformer.h.0.attn.c_attn.weight"], total)
    assert same(found["second_moment/transformer.h.0.ln_1.weight"], normal)
    assert "transformer.h.0.attn.c_attn.weight" in found.transposed and "lm_head.weight" not in found.transposed
    tokens = torch.cat([one["input_ids"][0] for one in data])
    assert torch.equal(found["frequency/transformer.wte.weight"], torch.bincount(tokens, minlength=30).double())
    assert found.count("frequency/transformer.wte.weight") == len(tokens)
    # Positions are those of every example, without the padding.
    expected = torch.zeros(16).double()
    for one in data:
        expected[: one["input_ids"].shape[1]] += 1
    assert torch.equal(found["frequency/transformer.wpe.weight"], expected)


def test_inputs_that_layers_share_are_kept_once() -> None:
    module, data = made("llama")
    found = collect(module, batched(data, 3), ["gram", "second_moment"])
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert found.aliases == {
        f"gram/{attention}.k_proj.weight": f"gram/{attention}.q_proj.weight",
        f"gram/{attention}.v_proj.weight": f"gram/{attention}.q_proj.weight",
        f"gram/{mlp}.up_proj.weight": f"gram/{mlp}.gate_proj.weight",
    }
    assert torch.equal(found[f"gram/{attention}.v_proj.weight"], found[f"gram/{attention}.q_proj.weight"])
    with torch.no_grad():
        rows = torch.cat([module.model.embed_tokens(one["input_ids"])[0] for one in data])
    normalised = rows / (rows.square().mean(-1, keepdim=True) + module.config.rms_norm_eps).sqrt()
    assert torch.allclose(
        found["second_moment/model.layers.0.input_layernorm.weight"], normalised.square().sum(0), rtol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["true", "empirical"])
def test_the_fisher_diagonal_example_by_example(name: str, estimator: str) -> None:
    module, data = made(name)
    sequences = name in ("gpt2", "llama")
    if sequences and estimator == "true":
        with pytest.raises(ConfigError, match="sums over every sequence"):
            collect(module, data[:1], ["fisher"], fisher="true")
        return
    labels = (lambda batch: batch["input_ids"]) if sequences else None
    found = collect(module, batched(data, 4), ["fisher"], fisher=estimator, labels=labels)
    parameters = dict(module.named_parameters())
    expected = {key: torch.zeros_like(one) for key, one in parameters.items()}
    for one in data:
        logs = logits(module, one).log_softmax(-1)
        if estimator == "true":
            pairs = [(float(logs[0, y].exp()), logs[0, y]) for y in range(3)]
        elif sequences:
            pairs = [(1.0, sum(logs[0, t, y] for t, y in enumerate(one["input_ids"][0].tolist())))]
        else:
            target = one["labels"] if isinstance(one, dict) else one[1]
            pairs = [(1.0, logs[0, int(target)])]
        for weight, value in pairs:
            gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
            for key, gradient in zip(parameters, gradients, strict=True):
                expected[key] += 0 if gradient is None else weight * gradient**2
    every = dict(module.named_parameters(remove_duplicate=False))  # tied ones under each of their names
    assert set(found.names()) == {f"fisher/{key}" for key in every} and not found.uncovered
    for key, value in expected.items():
        assert torch.allclose(found[f"fisher/{key}"], value, rtol=1e-8, atol=1e-12), key
        assert found.count(f"fisher/{key}") == 6
    assert found.estimator == estimator


def test_sampled_labels_estimate_the_true_fisher() -> None:
    module, data = made("mlp")
    many = [[data[0][0].repeat(400, 1), data[0][1].repeat(400)]]
    true = collect(module, data[:1], ["fisher"], fisher="true")
    drawn = collect(module, many, ["fisher"], fisher="sampled", seed=1)
    assert torch.allclose(drawn.mean("fisher/3.weight"), true.mean("fisher/3.weight"), rtol=0.25, atol=1e-3)
    again, other = (collect(module, many, ["fisher"], seed=seed) for seed in (1, 2))
    assert torch.equal(drawn["fisher/3.weight"], again["fisher/3.weight"])
    assert not torch.equal(drawn["fisher/3.weight"], other["fisher/3.weight"])


@pytest.mark.parametrize("name", ["mlp", "conv", "bert"])
def test_the_output_factor_and_first_derivatives(name: str) -> None:
    module, data = made(name)
    found = collect(module, batched(data, 4), ["kfac_out", "gradient", "sensitivity"], fisher="empirical")
    key = {"mlp": "3.weight", "conv": "head.weight", "bert": "classifier.weight"}[name]
    parameters = dict(module.named_parameters())
    factor, total, sensitivity = torch.zeros(3, 3).double(), torch.zeros_like(parameters[key]), 0.0
    for one in data:
        target = int(one["labels"] if isinstance(one, dict) else one[1])
        scores = logits(module, one)
        # Of a softmax with its cross-entropy: p − onehot(y).
        g = scores[0].softmax(-1).detach() - functional.one_hot(torch.tensor(target), 3)
        factor += torch.outer(g, g)
        (slope,) = torch.autograd.grad(functional.cross_entropy(scores, torch.tensor([target])), parameters[key])
        total += slope
        sensitivity += float((slope * parameters[key]).abs().sum())
    assert torch.allclose(found[f"kfac_out/{key}"], factor, rtol=1e-9)
    assert torch.allclose(found[f"gradient/{key}"], total, rtol=1e-9, atol=1e-13)
    assert float(found[f"sensitivity/{key}"]) == pytest.approx(sensitivity, rel=1e-9)


KINDS = ["gram", "fisher", "second_moment", "frequency", "kfac_out"]


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_the_batch_size(name: str) -> None:
    module, data = made(name)
    module = module.float()
    data = [one if isinstance(one, dict) else [one[0].float(), one[1]] for one in data]
    one, two, three = (collect(module, batched(data, size), KINDS, group=4) for size in (1, 4, 6))
    assert one.names() == two.names() == three.names() and one.data == two.data == three.data
    for key in one.names():
        assert torch.equal(one[key], two[key]) and torch.equal(one[key], three[key]), key


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_parts_add_up_in_memory_and_in_files(tmp_path: Path, name: str) -> None:
    module, data = made(name)
    whole = collect(module, data, KINDS, fisher="true", group=3)
    parts = [collect(module, part, KINDS, fisher="true", group=3) for part in (data[:3], data[3:])]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.safetensors")
    files = [Statistics.open(tmp_path / f"{number}.safetensors") for number in range(2)]
    for total in (parts[0] + parts[1], files[0] + files[1]):
        assert total.examples == 6 and set(total.names()) == set(whole.names())
        for key in whole.names():
            assert torch.allclose(total[key], whole[key], rtol=1e-13, atol=1e-18), key
            assert total.count(key) == whole.count(key)
    assert files[0].names() == parts[0].names() and files[0].uncovered == parts[0].uncovered
    for key in files[0].names():
        assert torch.equal(files[0][key], parts[0][key]), "packed triangles come back exactly"
    with pytest.raises(WeightsError, match="count twice"):
        parts[0] + parts[0]
    with pytest.raises(WeightsError, match="mask rules"):
        parts[0] + collect(module, data[3:], KINDS, fisher="true", mask="none")
    with pytest.raises(WeightsError, match="estimators"):
        parts[0] + collect(module, data[3:], KINDS, fisher="empirical", labels=lambda batch: torch.zeros(1).long())
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(WeightsError, match="different weights"):
        parts[0] + collect(module, data[3:], KINDS, fisher="true")


def test_padding_is_left_out_unless_it_is_asked_for() -> None:
    module, data = made("bert")
    batch = padded(data)
    left_out, counted = collect(module, [batch], ["gram"]), collect(module, [batch], ["gram"], mask="none")
    key = "gram/bert.encoder.layer.0.attention.self.query.weight"
    assert left_out.count(key) == int(batch["attention_mask"].sum()) < counted.count(key) == batch["input_ids"].numel()
    assert (left_out.mask, counted.mask) == ("padding left out", "all rows")
    pooled = "gram/classifier.weight"
    assert left_out.count(pooled) == counted.count(pooled) == 6


def test_the_module_is_left_as_it_was_and_dropout_is_off() -> None:
    module, data = made("vit")
    module.train()
    module.head.weight.requires_grad_(False)
    module.encoder.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    one, two = (collect(module, data, ["gram", "fisher"], fisher="true") for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one.names())
    assert module.training and not module.encoder.training and not module.head.weight.requires_grad
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(layer._forward_hooks for layer in module.modules())
    assert functional.multi_head_attention_forward.__module__ == "torch.nn.functional"


def test_what_no_rule_covers_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.used, self.idle = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x @ self.matrix)

    found = collect(Odd(), [torch.randn(4, 3)], ["gram"])
    assert found.uncovered == {
        "matrix": "no rule knows its layer",
        "used.bias": "no rule for a bias",
        "idle.weight": "its layer was not called",
        "idle.bias": "no rule for a bias",
    }
    assert not collect(Odd(), [torch.randn(4, 3)], ["fisher"]).uncovered


def test_a_module_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    module, x = Twice().double(), torch.randn(4, 3).double()
    found, middle = collect(module, [x], ["gram"]), module.layer(x).detach()
    assert same(found["gram/layer.weight"], x.T @ x + middle.T @ middle) and found.count("gram/layer.weight") == 8


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_collection_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr("soups.statistics.partial._SECONDS", 0.0)
    module, data = made("llama")
    kinds = ["gram", "second_moment", "frequency", "fisher"]
    whole = collect(module, data, kinds, group=2)

    def stop(number: int, examples: int) -> None:
        if number == at:
            raise Killed

    path = tmp_path / "out.safetensors"
    with pytest.raises(Killed):
        collect(module, data, kinds, group=2, resume=path, on_group=stop)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(StorageError, match="other settings"):
        collect(module, data, kinds, group=2, resume=path, seed=3)
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(0))
    again = collect(module, data, kinds, group=2, resume=path)
    handle.remove()
    assert len(calls) == (3 - at) * (1 + 2)  # a pass over the group's inputs, and one an example
    assert again.names() == whole.names() and again.data == whole.data and again.rows == whole.rows
    assert all(torch.equal(again[key], whole[key]) for key in whole.names())
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named() -> None:
    module, data = made("mlp")
    with pytest.raises(ConfigError, match="did you mean 'gram'"):
        collect(module, data, ["grams"])
    with pytest.raises(ConfigError, match="no Fisher estimator 'hard'"):
        collect(module, data, ["fisher"], fisher="hard")
    with pytest.raises(DataError, match="no data"):
        collect(module, [], ["gram"])
    with pytest.raises(DataError, match="no tensors"):
        collect(module, ["text"], ["gram"])
    with pytest.raises(DataError, match="needs labels"):
        collect(module, [data[0][0]], ["fisher"], fisher="empirical")
    with pytest.raises(ConfigError, match=r"GiB of memory, of which gram"):
        collect(module, data, ["gram"], budget=100)
    with pytest.raises(WeightsError, match=r"gram/0\.weight.*not finite"):
        collect(module, [torch.full((1, 4), torch.nan).double()], ["gram"])
    with pytest.raises(ConfigError, match="mask='all'"):
        collect(module, data, ["gram"], mask="all")
    with pytest.raises(DataError, match=r"tensors of \[1, 2\] examples"):
        collect(module, [[torch.zeros(1, 4), torch.zeros(2)]], ["gram"])
    found = collect(module, data, ["gram"])
    with pytest.raises(WeightsError, match=r"no tensor 'gram/9\.weight'"):
        found["gram/9.weight"]
    assert sizes(module, ["gram"])["gram"] == 8 * (16 + 25)
