"""Cached outputs of frozen layers: the same logits, gradients and weights as without; other weights are never confused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from soups.errors import ConfigError
from soups.evaluation import forward, predict
from soups.evaluation.batched import predict_many
from soups.tasks import frozen_layers
from soups.tasks.network import Network
from soups.tasks.text_models import huggingface_text
from soups.tasks.texts import Texts
from tests.tiny_text import sentences, write_bert, write_gpt2

TEXTS = Texts([text for text, _ in sentences(24)], [number % 2 for number in range(24)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen_layers, "_BLOCKS", {})
    monkeypatch.setattr(frozen_layers, "_FROZEN", {})


def network(place: Path, cached: bool, seed: int = 0, **options: object) -> Network:
    torch.manual_seed(seed)  # of the head
    chosen = {"pooling": "mean", "freeze_layers": 2, **options}
    return huggingface_text(str(place), 2, cache_frozen=cached, **chosen)


def batches(one: Network, size: int = 6) -> list[tuple[dict[str, Tensor], Tensor]]:
    data = one.input.dataset(TEXTS, 16)
    return [data[[(0, i) for i in range(at, at + size)]] for at in range(0, len(TEXTS), size)]


def layer_calls(one: Network) -> list[int]:
    """Count how often each layer of the encoder computes."""
    counts: list[int] = []
    stack = next(part for part in one.module.modules() if isinstance(part, nn.ModuleList))
    for number, layer in enumerate(stack):
        counts.append(0)
        real = layer._layer[0] if isinstance(layer, frozen_layers.FrozenLayer) else layer

        def count(*_: object, number: int = number) -> None:
            counts[number] += 1

        real.register_forward_hook(count)
    return counts


@pytest.mark.parametrize("kind", ["mean", "library", "gpt2"])
def test_logits_and_names_are_those_without_the_cache(kind: str, tmp_path: Path) -> None:
    layers = 2 if kind == "gpt2" else 3
    place = write_gpt2(tmp_path, layers) if kind == "gpt2" else write_bert(tmp_path, layers)
    options = {"pooling": "mean" if kind == "mean" else "library", "freeze_layers": layers - 1}
    plain, cached = (network(place, flag, **options) for flag in (False, True))
    assert list(plain.module.state_dict()) == list(cached.module.state_dict())
    assert [n for n, p in plain.module.named_parameters() if p.requires_grad] == [
        n for n, p in cached.module.named_parameters() if p.requires_grad
    ]
    expected = predict(plain.module, batches(plain))
    for size in (6, 4):  # other companions in the batch, other padding
        assert torch.allclose(predict(cached.module, batches(cached, size)), expected, atol=2e-6)
    assert len(expected.unique()) > 20


def test_frozen_layers_compute_once_for_all_epochs_networks_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_bert(tmp_path, 3)
    first = network(place, True)
    predict(first.module, batches(first))
    counts = layer_calls(first)
    for _ in range(3):
        predict(first.module, batches(first))
    assert counts == [0, 0, 12]
    second = network(place, True, seed=1)
    counts = layer_calls(second)
    predict(second.module, batches(second))
    assert counts == [1, 1, 6], "its own first use compares one batch both ways"
    monkeypatch.setattr(frozen_layers, "_BLOCKS", {})  # as in another process: what is on disk is read
    third = network(place, True)
    counts = layer_calls(third)
    predict(third.module, batches(third))
    assert counts == [1, 1, 6]


def test_training_is_the_same_and_leaves_frozen_layers_alone(tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3, dropout=0.0)
    results: list[dict[str, Tensor]] = []
    for flag in (False, True):
        one = network(place, flag)
        optimizer = torch.optim.SGD([p for p in one.module.parameters() if p.requires_grad], lr=0.5)
        one.module.train()
        for inputs, labels in batches(one) * 2:
            cross_entropy(forward(one.module, inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(one.module.state_dict())
    start = network(place, False).module.state_dict()
    for name, value in results[0].items():
        assert torch.allclose(results[1][name], value, atol=1e-5), name
        frozen = "embeddings" in name or ".layer.0." in name or ".layer.1." in name
        assert torch.equal(value, start[name]) == frozen, name


def test_dropout_is_off_below_and_on_above(tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3, dropout=0.5)
    one = network(place, True, dropout=0.5)
    assert any(isinstance(part, nn.Dropout) and part.p == 0.5 for part in one.module.modules())
    entering: list[Tensor] = []
    stack = next(part for part in one.module.modules() if isinstance(part, nn.ModuleList))
    stack[2].register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].detach().clone()))
    inputs, _ = batches(one)[0]
    with torch.no_grad():
        evaluated = forward(one.module.eval(), inputs)
        entering.clear()
        trained = [forward(one.module.train(), inputs) for _ in range(2)]
    assert torch.equal(entering[0], entering[1]) and not torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], evaluated)


def change_in_place(module: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    module.load_state_dict(weights)
    return forward(module, inputs)


def change_for_one_call(module: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return functional_call(module, weights, (), inputs)


@pytest.mark.parametrize("change", [change_in_place, change_for_one_call])
def test_other_frozen_weights_get_outputs_of_their_own(change: object, tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3)
    plain, cached = network(place, False).module.eval(), network(place, True)
    inputs = batches(cached)[0][0]
    first = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    other = {n: t + 0.3 * torch.randn_like(t) if t.is_floating_point() else t for n, t in first.items()}
    module = cached.module.eval()
    with torch.inference_mode():
        seen = [change(module, weights, inputs) for weights in (first, other, first, other)]  # type: ignore[operator]
        expected = [change_in_place(plain, weights, inputs) for weights in (first, other, first, other)]
    for found, right in zip(seen, expected, strict=True):
        assert torch.allclose(found, right, atol=2e-6)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_a_copy_and_several_models_at_once(tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3)
    one = network(place, True)
    expected = predict(one.module, batches(one))
    twin = copy.deepcopy(one.module)
    with torch.no_grad():
        for parameter in one.module.parameters():
            parameter.zero_()
    assert torch.allclose(predict(twin, batches(one)), expected, atol=2e-6), "a copy reads its own weights"
    states = [network(place, False, seed).module.state_dict() for seed in (0, 1)]
    together = predict_many(network(place, True).module, states, batches(one))
    for state, found in zip(states, together, strict=True):
        one.module.load_state_dict(state)
        assert torch.allclose(predict(one.module, batches(one)), found, atol=2e-6)


def test_texts_that_nobody_announced_and_left_padding_take_the_ordinary_way(tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3)
    plain, cached = network(place, False).module.eval(), network(place, True)
    predict(cached.module, batches(cached))
    module, counts = cached.module.eval(), layer_calls(cached)
    ids = torch.tensor([[2, 9, 9, 9, 9, 3]])
    padded = torch.tensor([[0, *batches(cached)[0][0]["input_ids"][0].tolist()]])
    for rows in (ids, padded):
        inputs = {"input_ids": rows, "attention_mask": (rows != 0).long()}
        with torch.inference_mode():
            assert torch.allclose(forward(module, inputs), forward(plain, inputs), atol=2e-6)
    assert counts == [2, 2, 2]


def test_nothing_to_cache_is_an_error(tmp_path: Path) -> None:
    place = write_bert(tmp_path, 3)
    with pytest.raises(ConfigError, match="freeze_layers=0"):
        network(place, True, freeze_layers=0)
    with pytest.raises(ConfigError, match="freeze_embeddings=False"):
        network(place, True, freeze_embeddings=False)


def test_layers_that_read_more_than_the_last_output_are_refused(tmp_path: Path) -> None:
    class Skipping(nn.Module):
        """Its top reads the first layer's output beside the last one's."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            first = self.layers[0](self.embed(input_ids))
            return self.head((first + self.layers[1](first)).mean(1))

    torch.manual_seed(0)
    module = Skipping().requires_grad_(False)
    ids = torch.tensor([[1, 2, 3]])
    frozen_layers.cache_frozen_layers(module, module.layers, 2, [module.embed]).expect([ids[0]])
    with pytest.raises(ConfigError, match="cannot be cached"):
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
