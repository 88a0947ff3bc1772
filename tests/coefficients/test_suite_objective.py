"""Objectives over tasks with heads: losses by hand, gradients by autograd over written-out mixtures, whole fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from soups.coefficients import Mixture, adamerging, dam, evolve, fit, lorahub, symerge
from soups.coefficients.suite_objective import SuiteObjective, agreement, cross_entropy, entropy, kl
from soups.errors import ConfigError, StorageError

CLASSES = {"one": 3, "two": 2}


class TinySuite:
    """tanh(x W) V_task, in float64; splits whose labels are known: those of the experts on adaptation, of the base on test."""

    device = torch.device("cpu")
    tasks = ("one", "two")
    fingerprint = "tiny"

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        self.base = {"w": normal(4, 5), "fixed": normal(5)}
        self.experts = {task: {"w": self.base["w"] + normal(4, 5), "fixed": self.base["fixed"]} for task in self.tasks}
        self.heads = {task: {"head": normal(5, count)} for task, count in CLASSES.items()}
        self._inputs = {
            (task, split): normal(40, 4) for task in self.tasks for split in ("adaptation", "heldout", "test")
        }
        self.read: list[str] = []

    def labels(self, task: str, split: str) -> Tensor:
        weights = self.base if split == "test" else self.experts[task]
        return self.forward(weights, task, self._inputs[task, split]).argmax(1)

    def batches(self, task: str, split: str) -> list[tuple[Tensor, Tensor]]:
        self.read.append(split)
        x, y = self._inputs[task, split], self.labels(task, split)
        return [(x[:30], y[:30]), (x[30:], y[30:])]

    def forward(self, weights, task: str, inputs: Tensor, head: Mapping[str, Tensor] | None = None) -> Tensor:
        return torch.tanh(inputs @ weights["w"] + weights["fixed"]) @ (head or self.heads[task])["head"]

    def predict(self, weights, task: str, split: str, head: Mapping[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.forward(weights, task, x, head) for x, _ in self.batches(task, split)])

    def evaluate(self, weights, split="heldout", tasks=None, heads=None):
        found = {}
        for task in tasks or self.tasks:
            right = self.predict(weights, task, split, (heads or {}).get(task)).argmax(1) == self.labels(task, split)
            found[task] = SimpleNamespace(accuracy=float(right.double().mean()))
        return found


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    p = [math.exp(2) / (1 + math.exp(2)), math.e / (1 + math.e), math.exp(3) / (1 + math.exp(3))]
    h = [-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p]
    assert float(entropy(logits, None, None)) == pytest.approx(sum(h) / 3)
    labels = torch.tensor([0, 0, 1])
    expected = [-math.log(p[0]), -math.log(1 - p[1]), -math.log(1 - p[2])]
    assert float(cross_entropy(logits, labels, None)) == pytest.approx(sum(expected) / 3)
    # The first agrees; the second does not, and the expert is surer; the third does not, and the expert is less sure.
    expert = torch.tensor([[0.1, 0.0], [5.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    kept = [-math.log(p[0]), -math.log(1 - p[1])]
    assert float(agreement(logits, None, expert)) == pytest.approx(sum(kept) / 2)
    last = logits[2:].clone().requires_grad_()
    alone = agreement(last, None, expert[2:])
    assert float(alone.detach()) == 0.0 and not torch.autograd.grad(alone, last)[0].any()
    halves = (expert / 2).softmax(1), (logits / 2).softmax(1)
    by_hand = (halves[0] * (halves[0].log() - halves[1].log())).sum(1).mean() * 4
    assert float(kl(logits, None, expert)) == pytest.approx(float(by_hand.detach()))


@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "agreement", "kl"])
def test_the_gradient_is_autograds(name: str) -> None:
    suite = TinySuite()
    mixture = Mixture(suite.base, suite.experts, granularity="tensor", start=0.4)
    assert mixture.moving() == ["w"]
    losses = {"entropy": entropy, "cross_entropy": cross_entropy, "agreement": agreement, "kl": kl}
    objective = SuiteObjective(suite, losses[name], mixture.moving(), batch_size=30, fit_heads=True)
    free = torch.full((2, 2), 0.4, dtype=torch.float64, requires_grad=True)
    w = suite.base["w"] + sum(free[0, i] * (suite.experts[t]["w"] - suite.base["w"]) for i, t in enumerate(suite.tasks))
    step = next(n for n in range(20) if all(len(x) == 30 for _, x, _, _ in objective._samples(n)))
    total = 0
    for task, inputs, labels, expert in objective._samples(step):
        logits = torch.tanh(inputs @ w + suite.base["fixed"]) @ suite.heads[task]["head"]
        total = total + losses[name](logits, labels, expert)
        assert torch.allclose(expert, suite.forward(suite.experts[task], task, inputs)), "rows stay together"
        assert torch.equal(labels, expert.argmax(1))
    total.backward()
    found = objective.gradient(mixture.weights(), step)
    mixture.backward(found.by_tensor)
    assert found.loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert torch.allclose(mixture.free.grad[0], free.grad[0], rtol=1e-10) and mixture.free.grad[1].abs().max() == 0
    assert set(found.by_parameter) == {"one/head", "two/head"} and found.by_parameter["two/head"].abs().max() > 0


def test_samples_of_a_pass_are_seen_once_and_by_seed() -> None:
    suite = TinySuite()
    made = [SuiteObjective(suite, entropy, ["w"], batch_size=7, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([one._samples(step) for step in range(7)] for one in made)
    for task in range(2):
        rows = torch.cat([samples[task][1] for samples in first])  # 5 + 2 small batches: one pass
        assert sorted(rows[:, 0].tolist()) == sorted(suite._inputs[suite.tasks[task], "adaptation"][:, 0].tolist())
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(first, again, strict=True))
    assert not all(
        a[0][1].shape == b[0][1].shape and torch.equal(a[0][1], b[0][1]) for a, b in zip(first, other, strict=True)
    )
    single = SuiteObjective(suite, entropy, ["w"], one_task=True)
    rounds = [[single._samples(2 * n + k)[0][0] for k in range(2)] for n in range(8)]
    assert all(sorted(one) == ["one", "two"] for one in rounds) and len({tuple(one) for one in rounds}) == 2


def test_adamerging_lowers_entropy_and_reports_accuracy_beside_its_start() -> None:
    suite = TinySuite()
    found = adamerging(suite.base, suite.experts, suite, per="task", lr=0.02, steps=60)
    assert sum(found.history[-10:]) < sum(found.history[:10]) and found.coefficients.shape == (1, 2)
    assert bool(((found.coefficients >= 0) & (found.coefficients <= 1)).all())
    assert set(found.accuracy) == {"start", "fitted", "experts"} and found.accuracy["experts"] == {
        "one": 1.0,
        "two": 1.0,
    }
    start = suite.evaluate(Mixture(suite.base, suite.experts).weights())
    assert found.accuracy["start"] == {task: one.accuracy for task, one in start.items()}
    assert found.adapted_on == "adaptation"


def test_only_the_adaptation_split_is_fitted_on_and_only_heldout_is_evaluated() -> None:
    suite = TinySuite()
    adamerging(suite.base, suite.experts, suite, steps=2)
    assert set(suite.read) == {"adaptation", "heldout"}
    suite.read.clear()
    found = fit(Mixture(suite.base, suite.experts), "entropy", suite=suite, steps=2, split="test", evaluate=False)
    assert set(suite.read) == {"test"} and found.adapted_on == "test" and not found.accuracy


def test_presets_of_adamerging() -> None:
    suite = TinySuite()
    link = fit(
        Mixture(suite.base, suite.experts, link="clamp"), "entropy", suite=suite, repeats=2, steps=5, evaluate=False
    )
    authors = adamerging(suite.base, suite.experts, suite, per="task", steps=5, evaluate=False)
    assert torch.equal(link.coefficients, authors.coefficients) and link.history == authors.history
    bench = adamerging(
        suite.base, suite.experts, suite, per="task", preset="fusionbench", steps=5, start=1.4, evaluate=False
    )
    assert float(bench.coefficients.min()) > 1.3 and not torch.equal(bench.coefficients, authors.coefficients)
    clamped = adamerging(suite.base, suite.experts, suite, per="task", start=1.4, steps=5, evaluate=False)
    assert clamped.coefficients.tolist() == [[1.0, 1.0]]  # outside [0, 1] the derivative is zero


def test_symerge_recovers_the_experts_and_fits_heads() -> None:
    suite = TinySuite()
    found = symerge(suite.base, suite.experts, suite, rounds=40)
    fitted, start = (sum(found.accuracy[name].values()) for name in ("fitted", "start"))
    assert fitted > start and len(found.history) == 80
    assert found.heads.keys() == set(suite.tasks) and not torch.equal(
        found.heads["one"]["head"], suite.heads["one"]["head"]
    )
    check = suite.evaluate(found.weights, "heldout", None, found.heads)
    assert found.accuracy["fitted"] == {task: one.accuracy for task, one in check.items()}
    assert not symerge(suite.base, suite.experts, suite, rounds=1, fit_heads=False).heads


def test_dam_moves_columns_and_pays_for_likeness() -> None:
    suite = TinySuite()
    found = dam(suite.experts, suite, steps=20, lr=0.02, evaluate=False)
    assert found.coefficients.shape == (5 + 1, 2)  # five columns of w, one factor for the bias
    paid = dam(suite.experts, suite, steps=1, diversity=1.0, evaluate=False).history[0]
    free = dam(suite.experts, suite, steps=1, diversity=0.0, evaluate=False).history[0]
    assert paid - free == pytest.approx(1.0)  # equal factors have a cosine of 1


def test_evolve_keeps_its_budget_and_climbs(tmp_path: Path) -> None:
    suite = TinySuite()
    found = evolve(suite.base, suite.experts, suite=suite, evaluations=30, seed=1, resume=tmp_path / "trials.jsonl")
    assert len(found.history) == 30
    best = max(found.history)
    assert sum(found.accuracy["fitted"].values()) / 2 == pytest.approx(best) and best >= found.history[0]
    again = evolve(suite.base, suite.experts, suite=suite, evaluations=30, seed=1, resume=tmp_path / "trials.jsonl")
    assert torch.equal(again.coefficients, found.coefficients)
    with pytest.raises(StorageError, match="other models, data or settings"):
        evolve(suite.base, suite.experts, suite=suite, evaluations=30, seed=2, resume=tmp_path / "trials.jsonl")


def test_lorahub_divides_by_the_number_of_examples() -> None:
    source = torch.Generator().manual_seed(0)
    adapters = {n: {"a": torch.randn(2, 3, generator=source, dtype=torch.float64)} for n in ("x", "y")}
    target = 0.7 * adapters["x"]["a"] - 0.4 * adapters["y"]["a"]
    seen = []

    def loss(weights) -> float:
        seen.append(weights["a"].clone())
        return 100 * float((weights["a"] - target).square().sum())

    found = lorahub(adapters, loss, examples=5, evaluations=60)
    assert torch.equal(seen[0], torch.zeros(2, 3).double())  # from nothing
    assert found.coefficients[0].tolist() == pytest.approx([0.7, -0.4], abs=0.02)
    # The value at w = (0, 0) is −loss / 5; at the best point −loss / 5 − 0.05 · mean |w|.
    assert found.history[0] == pytest.approx(-100 * float(target.square().sum()) / 5)
    w = found.coefficients
    made = w[0, 0] * adapters["x"]["a"] + w[0, 1] * adapters["y"]["a"]
    expected = -100 * float((made - target).square().sum()) / 5 - 0.05 * float(w.abs().mean())
    assert max(found.history) == pytest.approx(expected)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 30, 47])
def test_an_interrupted_adamerging_ends_in_the_same_bits(tmp_path: Path, at: int) -> None:
    suite = TinySuite()
    whole = adamerging(suite.base, suite.experts, suite, steps=60, evaluate=False)

    def stop(step: int, value: float) -> None:
        if step == at:
            raise Killed

    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        adamerging(suite.base, suite.experts, suite, steps=60, evaluate=False, resume=path, on_step=stop)
    again = adamerging(suite.base, suite.experts, suite, steps=60, evaluate=False, resume=path)
    assert torch.equal(again.coefficients, whole.coefficients) and again.history == whole.history


def test_mistakes_are_named() -> None:
    suite = TinySuite()
    mixture = Mixture(suite.base, suite.experts)
    for arguments, options, message in (
        (("entropi",), {"suite": suite}, "did you mean 'entropy'"),
        (("entropy",), {}, "suite=open_suite"),
        (("accuracy",), {"suite": suite}, "has no gradient"),
        ((lambda weights: 0.0,), {}, "has no gradient"),
        (("entropy",), {"suite": suite, "optimiser": "adamx"}, "did you mean 'adam'"),
        (("entropy",), {"suite": suite, "batch_size": 0}, "at least 1"),
        (("agreement",), {"suite": suite, "optimiser": "cma", "fit_heads": True}, "needs an optimiser with gradients"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(mixture, *arguments, **{"steps": 1, **options})
    with pytest.raises(ConfigError, match="no preset 'author'"):
        adamerging(suite.base, suite.experts, suite, preset="author")
