"""Branch-Train-Merge: posteriors and mixtures in closed form, and the whole plan on two made-up languages."""

import math
from pathlib import Path

import pytest
import torch

from soups.errors import ConfigError
from soups.protocols import build_protocol, execute, in_sequence
from soups.protocols.branch_train_merge.mixture import domain_posterior, mixture_loss
from soups.protocols.branch_train_merge.run import BranchTrainMerge
from soups.seeding import generator
from soups.stores.pool import Pool
from soups.tasks import language_modelling
from tests.devices import ACCELERATOR
from tests.launch.conftest import compose_settings


def test_the_posterior_is_bayes_rule_averaged_over_samples() -> None:
    likelihoods = torch.tensor([[0.2, 0.5], [0.6, 0.1]], dtype=torch.float64).log()
    first = [0.25, 0.75]  # uniform weights times 0.2 and 0.6
    weights = [0.7 * 0.5 + 0.3 * share for share in first]
    second = [weights[0] * 0.5, weights[1] * 0.1]
    expected = [0.7 * w + 0.3 * s / sum(second) for w, s in zip(weights, second, strict=True)]
    assert domain_posterior(likelihoods, 0.3).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_mixture_mixes_probabilities_not_their_logarithms() -> None:
    likelihoods = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64).log()
    expected = -(math.log(0.25 * 0.5 + 0.75 * 0.1) + math.log(0.25 * 0.1 + 0.75 * 0.3)) / 2
    assert mixture_loss(likelihoods, torch.tensor([0.25, 0.75])) == pytest.approx(expected, abs=1e-12)
    assert mixture_loss(likelihoods, torch.tensor([0.0, 1.0])) == pytest.approx(
        -float(likelihoods[1].mean()), abs=1e-12
    )


def language(words: tuple[str, ...], seed: int) -> str:
    picks = torch.randint(len(words), (4000,), generator=generator(seed, "language")).tolist()
    return " ".join(words[pick] for pick in picks)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BranchTrainMerge:
    texts = {"a": language(("ab", "abba", "b"), 0), "b": language(("xyz", "zyx", "yy"), 1)}
    monkeypatch.setattr(language_modelling, "DOMAINS", {name: (lambda text=text: text) for name, text in texts.items()})
    program = build_protocol(compose_settings(overrides(tmp_path)))
    assert isinstance(program, BranchTrainMerge)
    return program


def overrides(place: Path, *more: str) -> list[str]:
    return [
        "+protocol=btm", "protocol.domains=[a,b]", "protocol.text={characters: 8000, windows: 16}", "protocol.steps=24",
        "protocol.seed_shares=[0.0,0.5]", "protocol.model={context: 16, width: 16, heads: 2, layers: 1}",
        "protocol.optimizer.batch=8", "protocol.samples=5", f"trainer.accelerator={ACCELERATOR}", "trainer.threads=1", "tracking=off",
        f"pool.path={place}/pool", f"paths.output={place}/outputs", *more,
    ]  # fmt: skip


def test_experts_branch_from_the_seed_and_are_averaged_by_their_posterior(program: BranchTrainMerge) -> None:
    pool, plan, nodes = Pool(program.configuration.pool.path), program.plan(), program.nodes
    assert execute(plan, pool, in_sequence(pool, program.operations())) == {}
    for branch in nodes.branches:
        experts = {name: pool.weights(node.fingerprint) for name, node in branch.experts.items()}
        seeds = {node.inputs[0].fingerprint if node.inputs else None for node in branch.experts.values()}
        assert len(seeds) == 1 and (seeds == {None}) == (branch.share == 0), "one seed phase for all"
        steps = sum(node.parameters.steps for node in branch.experts.values())
        steps += sum(node.inputs[0].parameters.steps for node in list(branch.experts.values())[:1] if node.inputs)
        assert steps == 24, "the budget is the dense model's"
        for domain, score in branch.posterior_average.items():
            merged = score.inputs[0]
            weights = pool.weights(merged.input("posterior").fingerprint)["weights"]
            assert float(weights.sum()) == pytest.approx(1) and weights.argmax() == list(experts).index(domain)
            found = pool.weights(merged.fingerprint)
            for name, tensor in found.items():
                exact = (
                    sum(w * m[name].double() for w, m in zip(weights, experts.values(), strict=True)) / weights.sum()
                )
                assert torch.equal(tensor, exact.float()), name
    losses = program.losses(pool)
    for label in ("0% seed", "50% seed"):
        own, mixture = losses[f"{label}: own expert"], losses[f"{label}: ensemble by posterior"]
        # The mixture can lose no more than −log of its own expert's weight.
        for domain in "ab":
            node = nodes.branches[label == "50% seed"].ensemble[domain]
            weight = pool.ingredient(node.fingerprint).notes["weights"]["ab".index(domain)]
            assert mixture[domain] <= own[domain] - math.log(weight) + 1e-9
    page = program.page(plan, pool)
    assert len(page.parts[0].rows) == 9 and page.parts[1].series["dense"][0] == pytest.approx(
        math.exp(sum(losses["dense"].values()) / 2)
    )


def test_mistakes(tmp_path: Path) -> None:
    for wrong, message in (
        ("protocol.domains=[python]", "names 1 domains"),
        ("protocol.seed_shares=[1.0]", r"shares in \[0, 1\)"),
        ("protocol.steps=1", "leaves nothing to share"),
        ("protocol.decay=0", "in \\(0, 1\\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_protocol(compose_settings(overrides(tmp_path, wrong)))
