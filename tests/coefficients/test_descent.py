"""Descent on coefficients: the path of torch's optimiser over written-out weights, and interrupted fits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from soups.coefficients import LossGradient, Mixture, State, descend
from soups.errors import ConfigError, StorageError

BASE = {"w": torch.zeros(3, dtype=torch.float64), "v": torch.ones(2, dtype=torch.float64)}
EXPERTS = [
    {"w": torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), "v": torch.tensor([2.0, 1.0], dtype=torch.float64)},
    {"w": torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64), "v": torch.tensor([1.0, 5.0], dtype=torch.float64)},
]
TARGETS = [torch.tensor([0.5, 1.5, 1.0]), torch.tensor([0.2, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])]


class Squares:
    """‖scale · w − target‖² + ‖v‖², with a scale of its own."""

    def __init__(self) -> None:
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.batches = len(TARGETS)
        self.parameters = {"scale": self.scale}

    def gradient(self, weights: dict[str, Tensor], batch: int) -> LossGradient:
        w, v = (weights[name].clone().requires_grad_() for name in ("w", "v"))
        loss = (self.scale * w - TARGETS[batch]).square().sum() + v.square().sum()
        by_w, by_v, by_scale = torch.autograd.grad(loss, [w, v, self.scale])
        return LossGradient(float(loss.detach()), {"w": by_w, "v": by_v}, {"scale": by_scale})


def mixture() -> Mixture:
    return Mixture(BASE, EXPERTS, granularity="tensor", start=0.3)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fifty_steps_are_those_of_torch_over_written_out_weights(name: str) -> None:
    ours, objective = mixture(), Squares()
    order = lambda number: [number % 3, (number + 1) % 3, (number + 2) % 3]  # noqa: E731
    made, losses = descend(ours, objective, steps=50, optimiser=name, lr=0.02, weight_decay=0.1, order=order)

    free = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    optimiser = kind([free, scale], lr=0.02, weight_decay=0.1)
    expected = []
    for step in range(50):
        w = sum(free[0, i] * EXPERTS[i]["w"] for i in range(2))
        v = BASE["v"] + sum(free[1, i] * (EXPERTS[i]["v"] - BASE["v"]) for i in range(2))
        loss = (scale * w - TARGETS[order(step // 3)[step % 3]]).square().sum() + v.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(ours.free, free, rtol=1e-9) and float(objective.scale) == pytest.approx(
        float(scale), rel=1e-9
    )
    assert torch.allclose(made["w"], w.detach(), atol=0.2) and not torch.equal(made["w"], w.detach())
    assert torch.equal(made["w"], ours.weights()["w"])


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("at", [1, 9, 10, 23])
def test_an_interrupted_fit_ends_in_the_same_bits(tmp_path: Path, name: str, at: int) -> None:
    whole = mixture()
    _, losses = descend(whole, Squares(), steps=30, optimiser=name, lr=0.05, seed=3)

    def stop(step: int, loss: float) -> None:
        if step == at:
            raise Killed

    state = State(tmp_path / "state.safetensors", "fit", every=5)
    with pytest.raises(Killed):
        descend(mixture(), Squares(), steps=30, optimiser=name, lr=0.05, seed=3, state=state, on_step=stop)
    again, objective, steps = mixture(), Squares(), []
    _, more = descend(
        again,
        objective,
        steps=30,
        optimiser=name,
        lr=0.05,
        seed=3,
        state=state,
        on_step=lambda step, _: steps.append(step),
    )
    assert torch.equal(again.free, whole.free) and more == losses
    assert steps[0] == at // 5 * 5 + 1
    finished, final = mixture(), Squares()
    made, more = descend(finished, final, steps=30, optimiser=name, lr=0.05, seed=3, state=state, on_step=stop)
    assert torch.equal(finished.free, whole.free) and torch.equal(final.scale, objective.scale) and more == losses
    assert torch.equal(made["w"], whole.weights()["w"])


def test_the_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    descend(mixture(), Squares(), steps=2, state=State(path, "one"))
    with pytest.raises(StorageError, match="another"):
        descend(mixture(), Squares(), steps=2, state=State(path, "two"))


def test_the_seed_decides_the_order() -> None:
    made = [mixture() for _ in range(3)]
    for one, seed in zip(made, (0, 0, 1), strict=True):
        descend(one, Squares(), steps=4, lr=0.1, seed=seed)
    assert torch.equal(made[0].free, made[1].free) and not torch.equal(made[0].free, made[2].free)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adam'"):
        descend(mixture(), Squares(), steps=1, optimiser="adamm")
    with pytest.raises(ConfigError, match="steps=0"):
        descend(mixture(), Squares(), steps=0)
    with pytest.raises(ConfigError, match="lr=0"):
        descend(mixture(), Squares(), steps=1, lr=0)
