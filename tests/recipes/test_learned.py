"""The learned soup, streamed, against autograd through a mixture that is in memory as a whole."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from soups.coefficients import Mixture
from soups.errors import ConfigError, WeightsError
from soups.evaluation import HeldoutGradient, diagonal_fisher
from soups.recipes import Candidate, learned
from soups.seeding import generator
from soups.stores import DictStore


class Tied(nn.Module):
    """Two layers that share a matrix, BatchNorm with its integer counter, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.two(torch.tanh(self.one(x)))))


def setting(models: int = 3) -> tuple[nn.Module, list[Candidate], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    module = Tied().double().eval()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def made(number: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(number)
        moved = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=source, dtype=tensor.dtype)
            if tensor.is_floating_point() and "running" not in name
            else tensor
            for name, tensor in start.items()
        }
        moved["two.weight"] = moved["one.weight"]
        return moved

    pool = [Candidate(f"m{n}", -float(n), lambda n=n: made(n)) for n in range(models)]
    batches = [(torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(4)]
    return module, pool, batches


def in_memory(module: nn.Module, pool: list[Candidate], per: str, logits: Tensor, beta: Tensor, batch) -> Tensor:
    """The authors' way: all models in memory, the loss differentiable in the shares."""
    weights = [candidate.load() for candidate in pool]
    names = [name for name, tensor in weights[0].items() if tensor.is_floating_point() and name != "two.weight"]
    shares = logits.softmax(dim=1)
    mixed = {
        name: sum(shares[number if per == "tensor" else 0, i] * model[name] for i, model in enumerate(weights))
        for number, name in enumerate(names)
    }
    # PyTorch's BatchNorm in evaluation mode has no derivative by its statistics.
    mixed = {name: tensor.detach() if "running" in name else tensor for name, tensor in mixed.items()}
    return functional.cross_entropy(beta * functional_call(module, mixed, (batch[0],)), batch[1])


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_the_streamed_gradient_is_autograds(per: str) -> None:
    module, pool, batches = setting()
    mixture = Mixture(
        None, {one.name: DictStore(one.load(), one.name) for one in pool}, granularity=per, link="softmax"
    )
    torch.manual_seed(1)
    with torch.no_grad():
        mixture.free.copy_(torch.randn_like(mixture.free))
    exact = mixture.free.detach().clone().requires_grad_()
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = in_memory(module, pool, per, exact, beta, batches[0])
    expected, by_beta = torch.autograd.grad(loss, [exact, beta])

    slope = HeldoutGradient(module, batches)(mixture.weights(), 0, 1.3)
    mixture.backward(slope.by_tensor)
    assert slope.loss == pytest.approx(float(loss), rel=1e-13)
    assert slope.by_beta == pytest.approx(float(by_beta), rel=1e-12)
    assert mixture.free.grad is not None and expected.abs().max() > 1e-4
    assert torch.allclose(mixture.free.grad, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_the_whole_descent_is_the_authors(per: str) -> None:
    module, pool, batches = setting()
    soup = learned(pool, lambda weights: 7.0, HeldoutGradient(module, batches), per=per, epochs=3, seed=5)
    rows = 1 if per == "model" else len([n for n, t in pool[0].load().items() if t.is_floating_point()]) - 1
    logits = torch.zeros(rows, 3, dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, beta], lr=0.05, weight_decay=0.0)
    for epoch in range(3):
        for number in torch.randperm(4, generator=generator(5, "learned", epoch)).tolist():
            optimizer.zero_grad()
            in_memory(module, pool, per, logits, beta, batches[number]).backward()
            optimizer.step()
    shares = logits.detach().softmax(dim=1)
    if per == "model":
        assert [soup.coefficients[f"m{i}"] for i in range(3)] == pytest.approx(shares[0].tolist(), rel=1e-9)
    else:
        # AdamW divides by the gradient's size: the statistics' rows, without a gradient, stay equal.
        streamed = torch.tensor([list(row.values()) for row in soup.by_tensor.values()], dtype=torch.float64)
        assert torch.allclose(streamed, shares, rtol=1e-7)
        assert list(soup.by_tensor["norm.running_mean"].values()) == pytest.approx([1 / 3] * 3)
    assert soup.details["beta"] == pytest.approx(float(beta), rel=1e-9)
    assert soup.score == 7.0 and soup.details["loss_by_epoch"][2] < soup.details["loss_by_epoch"][0]
    assert soup.weights["two.weight"] is soup.weights["one.weight"]
    assert soup.weights["norm.num_batches_tracked"].dtype == torch.int64
    mixed = sum(soup.coefficients[one.name] * one.load()["head.weight"] for one in pool)
    if per == "model":
        assert torch.allclose(soup.weights["head.weight"], mixed, atol=1e-14)


def test_without_beta_and_by_seed() -> None:
    module, pool, batches = setting()
    fixed = learned(pool, lambda w: 0.0, HeldoutGradient(module, batches), beta=False, epochs=1)
    assert fixed.details["beta"] == 1.0
    again = learned(pool, lambda w: 0.0, HeldoutGradient(module, batches), beta=False, epochs=1)
    assert torch.equal(fixed.weights["head.weight"], again.weights["head.weight"])
    other = learned(pool, lambda w: 0.0, HeldoutGradient(module, batches), beta=False, epochs=1, seed=1)
    assert not torch.equal(fixed.weights["head.weight"], other.weights["head.weight"])


class Counting(DictStore):
    """A store that makes each tensor when it is read, and knows how many numbers it made are alive."""

    alive = 0
    peak = 0

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        return self._made(super().read(key, rows).clone())

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        return self._made(super().read_flat(key, start, stop).clone())

    def _made(self, tensor: Tensor) -> Tensor:
        count = tensor.numel()
        Counting.alive += count
        Counting.peak = max(Counting.peak, Counting.alive)

        def gone() -> None:
            Counting.alive -= count

        weakref.finalize(tensor, gone)
        return tensor


def test_ingredients_are_in_memory_one_tensor_at_a_time() -> None:
    """However many there are: two tensors of 36 numbers at most (the first model's and the one being added)."""
    module, pool, batches = setting(models=8)
    gc.disable()
    try:
        streamed = [Candidate(one.name, one.score, one.load, lambda one=one: Counting(one.load())) for one in pool]
        Counting.alive = Counting.peak = 0
        learned(streamed, lambda weights: 0.0, HeldoutGradient(module, batches), epochs=1)
    finally:
        gc.enable()
    assert 36 <= Counting.peak <= 2 * 36 + 1


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    module, pool, batches = setting()
    one = (batches[1][0][:1], batches[1][1][:1])  # fewer samples than ranks
    slope = HeldoutGradient(module, [batches[0], one])
    found = [slope(pool[0].load(), number, 1.3) for number in (0, 1)]
    torch.save([(float(s.loss), s.by_beta, dict(s.by_tensor)) for s in found], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_a_batch_and_have_the_same_gradient(tmp_path: Path) -> None:
    processes.start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    module, pool, batches = setting()
    one = (batches[1][0][:1], batches[1][1][:1])
    for number, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        alone = HeldoutGradient(module, [batches[0], one])(pool[0].load(), number, 1.3)
        assert ours[0] == theirs[0] == pytest.approx(alone.loss, rel=1e-12)
        assert ours[1] == theirs[1] == pytest.approx(alone.by_beta, rel=1e-12)
        assert set(ours[2]) == set(alone.by_tensor)
        for name, value in alone.by_tensor.items():
            assert torch.equal(ours[2][name], theirs[2][name])
            assert torch.allclose(ours[2][name], value, rtol=1e-11, atol=1e-15)


def test_mistakes() -> None:
    module, pool, batches = setting()
    gradient = HeldoutGradient(module, batches)
    for options, message in (
        ({"per": "layer"}, "no per 'layer'"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"lr": -1.0}, "lr=-1.0 positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            learned(pool, lambda weights: 0.0, gradient, **options)
    odd = [*pool, Candidate("odd", -9.0, lambda: {"w": torch.zeros(2)})]
    with pytest.raises(WeightsError, match="odd does not fit"):
        learned(odd, lambda weights: 0.0, gradient)


def test_the_fisher_information_is_the_mean_of_squared_gradients() -> None:
    """Of a linear softmax model, by its closed form: the gradient of a sample is (p − onehot(argmax p)) xᵀ."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3, bias=True).double()
    inputs = torch.randn(10, 4, dtype=torch.float64)
    batches = [(inputs[:6], torch.zeros(6).long()), (inputs[6:], torch.zeros(4).long())]
    found = diagonal_fisher(module, module.state_dict(), batches, samples=8)
    logits = module(inputs[:8]).detach()
    error = logits.softmax(1) - functional.one_hot(logits.argmax(1), 3)
    assert torch.allclose(found["weight"].double(), (error[:, :, None] * inputs[:8, None]).square().mean(0), rtol=1e-5)
    assert torch.allclose(found["bias"].double(), error.square().mean(0), rtol=1e-5)
    with pytest.raises(ConfigError, match="needs samples"):
        diagonal_fisher(module, module.state_dict(), [], samples=8)
