"""Mixtures against autograd through weights that are written out, in float64: every granularity and link."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from soups.coefficients import GRANULARITIES, LINKS, Mixture
from soups.errors import ConfigError, WeightsError
from soups.stores import DictStore


class Net(nn.Module):
    """A tied pair of layers, a bias, BatchNorm with its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(torch.tanh(self.one(x))))


def weights(number: int) -> dict[str, Tensor]:
    torch.manual_seed(number)
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in Net().state_dict().items()
    }
    drawn = {name: torch.rand_like(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    drawn["two.weight"] = drawn["one.weight"]
    drawn["norm.running_var"] = torch.full((4,), 2.0, dtype=torch.float64)
    return {**state, **drawn}


BASE, EXPERTS = weights(0), {"a": weights(1), "b": weights(2), "c": weights(3)}
TENSORS = ["one.weight", "one.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
SIZES = {
    "one.weight": 16,
    "one.bias": 4,
    "norm.weight": 4,
    "norm.bias": 4,
    "norm.running_mean": 4,
    "norm.running_var": 4,
}
ROWS = {"model": 1, "group": 3, "tensor": 6, "column": 4 + 5, "element": 36}
GROUPS = {"group": r"^(one|norm\.running)"}


def expanded(coefficients: Tensor, granularity: str) -> dict[str, Tensor]:
    """Each tensor's coefficients, (models, *shape), by the definition of the granularity."""
    found: dict[str, Tensor] = {}
    row = 0
    for number, name in enumerate(TENSORS):
        shape = BASE[name].shape
        if granularity == "model":
            picked = coefficients[0]
        elif granularity == "group":
            picked = coefficients[0 if name.startswith("one") else 2 if "running" in name else 1]
        elif granularity == "tensor":
            picked = coefficients[number]
        elif granularity == "column":
            width = 4 if name == "one.weight" else 1
            block = coefficients[row : row + width]
            row += width
            found[name] = block.T[:, None, :].expand(3, *shape) if width == 4 else block[0][:, None].expand(3, *shape)
            continue
        else:
            block = coefficients[row : row + SIZES[name]]
            row += SIZES[name]
            found[name] = block.T.reshape(3, *shape)
            continue
        found[name] = picked.reshape(3, *([1] * len(shape))).expand(3, *shape)
    return found


def link(name: str, free: Tensor) -> Tensor:
    if name == "softmax":
        return free.exp() / free.exp().sum(1, keepdim=True)
    return {"none": free, "clamp": free.clamp(0, 1), "sigmoid": 1 / (1 + (-free).exp())}[name]


def written_out(free: Tensor, granularity: str, name: str, with_base: bool) -> dict[str, Tensor]:
    shares = expanded(link(name, free), granularity)
    mixed = {}
    for key in TENSORS:
        models = torch.stack([expert[key] for expert in EXPERTS.values()])
        mixed[key] = (
            BASE[key] + (shares[key] * (models - BASE[key])).sum(0) if with_base else (shares[key] * models).sum(0)
        )
    mixed["two.weight"] = mixed["one.weight"]
    return mixed


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LINKS)
def test_weights_and_gradient_are_those_of_the_definition(name: str, granularity: str, with_base: bool) -> None:
    mixture = Mixture(
        BASE if with_base else None, EXPERTS, granularity=granularity, link=name, groups=GROUPS.get(granularity)
    )
    assert mixture.free.shape == (ROWS[granularity], 3)
    torch.manual_seed(5)
    values = 0.05 + 0.3 * torch.rand(ROWS[granularity], 3, dtype=torch.float64)
    values[0, 1] = 1.2 if name == "clamp" else values[0, 1]
    values[-1, 0] = -0.2 if name == "clamp" else values[-1, 0]
    mixture.set(values)
    free = mixture.free.detach().clone().requires_grad_()
    expected = written_out(free, granularity, name, with_base)
    made = mixture.weights()
    for key, tensor in expected.items():
        assert torch.allclose(made[key], tensor.detach(), rtol=1e-13, atol=1e-14), key
    assert made["two.weight"] is made["one.weight"]
    assert torch.equal(made["norm.num_batches_tracked"], BASE["norm.num_batches_tracked"])

    net, inputs = Net().double().eval(), torch.randn(7, 4, dtype=torch.float64)
    buffers = {key: tensor.detach() if "running" in key else tensor for key, tensor in expected.items()}
    (functional_call(net, buffers, (inputs,)) ** 3).sum().backward()
    net.load_state_dict(made)
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad((net(inputs) ** 3).sum(), list(parameters.values()))
    mixture.backward(dict(zip(parameters, gradients, strict=True)))
    assert free.grad is not None and mixture.free.grad is not None and free.grad.abs().max() > 1e-3
    assert torch.allclose(mixture.free.grad, free.grad, rtol=1e-10, atol=1e-12)


def test_starts() -> None:
    assert Mixture(BASE, EXPERTS).coefficients().tolist() == [[0.3] * 3]
    assert Mixture(None, EXPERTS).coefficients().tolist() == [pytest.approx([1 / 3] * 3)]
    assert Mixture(BASE, EXPERTS, link="softmax").coefficients().tolist() == [pytest.approx([1 / 3] * 3)]
    assert Mixture(BASE, EXPERTS, link="sigmoid", start=0.7).coefficients().tolist() == [pytest.approx([0.7] * 3)]
    assert Mixture(BASE, EXPERTS, link="clamp", start=1.5).coefficients().tolist() == [[1.0] * 3]
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        Mixture(BASE, EXPERTS, link="sigmoid", start=1.0)
    with pytest.raises(ConfigError, match="sum to 1"):
        Mixture(BASE, EXPERTS, link="softmax", start=0.5)


def test_half_precision_is_rounded_once() -> None:
    base = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    experts = [{"w": torch.tensor([1.0078125, 2.5], dtype=torch.bfloat16)} for _ in range(3)]
    made = Mixture(base, experts, start=0.5).weights()["w"]
    # In bfloat16 throughout, 1 + 3 · 0.5 · 0.0078125 would be rounded after each model.
    assert made.dtype == torch.bfloat16
    assert made.tolist() == torch.tensor([1 + 1.5 * 0.0078125, 2.75]).bfloat16().tolist()


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="at least one model"):
        Mixture(BASE, {})
    with pytest.raises(ConfigError, match="no granularity 'layer'"):
        Mixture(BASE, EXPERTS, granularity="layer")
    with pytest.raises(ConfigError, match="no link 'relu'"):
        Mixture(BASE, EXPERTS, link="relu")
    with pytest.raises(ConfigError, match="groups"):
        Mixture(BASE, EXPERTS, granularity="group")
    with pytest.raises(ConfigError, match="groups"):
        Mixture(BASE, EXPERTS, groups="one")
    with pytest.raises(ConfigError, match=r"'h\.\*' matches no tensor"):
        Mixture(BASE, EXPERTS, granularity="group", groups=["one.*", "h.*"])
    with pytest.raises(ConfigError, match="2 values were given for 3"):
        Mixture(BASE, EXPERTS).set([0.1, 0.2])
    with pytest.raises(WeightsError, match="odd does not fit"):
        Mixture(BASE, {"odd": {"w": torch.zeros(1)}})


class Counting(DictStore):
    """A store that copies each tensor it reads, and counts the elements of its copies that are alive."""

    alive = peak = 0

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        return self._counted(super().read(key, rows).clone())

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        return self._counted(super().read_flat(key, start, stop).clone())

    @staticmethod
    def _counted(tensor: Tensor) -> Tensor:
        count = tensor.numel()
        Counting.alive += count
        Counting.peak = max(Counting.peak, Counting.alive)

        def gone() -> None:
            Counting.alive -= count

        weakref.finalize(tensor, gone)
        return tensor


@pytest.mark.parametrize("experts", [2, 16])
def test_memory_does_not_grow_with_the_number_of_experts(experts: int) -> None:
    gc.disable()
    try:
        stores = [Counting(weights(number)) for number in range(1, experts + 1)]
        mixture = Mixture(Counting(BASE), stores, granularity="tensor")
        Counting.alive = Counting.peak = 0
        made = mixture.weights()
        mixture.backward({key: made[key] for key in TENSORS})
    finally:
        gc.enable()
    # The base model's tensor and one expert's, of the largest tensor's 16 elements.
    assert Counting.peak <= 2 * 16
