"""Branch-Train-Merge (arXiv:2208.03306): a seed phase, one expert a domain from it, then an ensemble or an average of experts.

The weight of an expert on some text is its domain's posterior probability, estimated once on a few development samples.
Operations, done by `soups.launch.language`: ``lm.train``; ``lm.posterior``; ``lm.mean`` (uniform, or by a posterior);
``lm.score`` (perplexity on every domain) and ``lm.ensemble`` (of the mixture, on the posterior's domain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.protocols.plan import Node, Plan
from soups.seeding import derive_seed


@dataclass(frozen=True)
class Branching:
    """What a study is of.

    Attributes:
        domains: names, one expert each.
        text: parameters of the texts, the domains apart.
        model: parameters of the model.
        optimizer: parameters of every run, the steps apart.
        steps: of the whole budget, in steps of one batch.
        seed_shares: shares of the budget for the seed phase, one study each; the rest is shared out among the experts.
        samples: development windows for the posterior.
        decay: weight of a new sample in its moving average.
        seed: of initial weights and data.
    """

    domains: Sequence[str]
    text: Mapping[str, Any]
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    steps: int
    seed_shares: Sequence[float]
    samples: int = 100
    decay: float = 0.3
    seed: int = 0

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        if len(self.domains) < 2:
            raise ConfigError(f"protocol.domains names {len(self.domains)} domains; at least 2 are needed.")
        if not all(0 <= share < 1 for share in self.seed_shares):
            raise ConfigError(f"protocol.seed_shares={list(self.seed_shares)} must be shares in [0, 1).")
        if self.steps < 2 * len(self.domains):
            raise ConfigError(
                f"protocol.steps={self.steps} leaves nothing to share out among {len(self.domains)} experts."
            )
        if not 0 < self.decay <= 1 or self.samples < 1:
            raise ConfigError("protocol.decay must be in (0, 1], protocol.samples at least 1.")


@dataclass(frozen=True)
class Family:
    """The nodes of one seed share: perplexities by domain of each way to use the experts."""

    share: float
    experts: dict[str, Node]
    expert: dict[str, Node]
    ensemble: dict[str, Node]
    uniform: Node
    posterior_average: dict[str, Node]


@dataclass(frozen=True)
class Layout:
    """The dense model's scores and each family's."""

    dense: Node
    families: list[Family]

    def plan(self) -> Plan:
        """Return the plan."""
        scores: list[Node] = [self.dense]
        for family in self.families:
            scores += [family.uniform, *family.expert.values(), *family.ensemble.values()]
            scores += family.posterior_average.values()
        return Plan(tuple(scores))


def layout(study: Branching) -> Layout:
    """Return the nodes of a study.

    Raises:
        ConfigError: see `Branching.check`.
    """
    study.check()
    return Layout(
        _score(study, _train(study, list(study.domains), study.steps, (), "dense"), "dense"),
        [_family(study, share) for share in study.seed_shares],
    )


def _train(study: Branching, domains: list[str], steps: int, start: tuple[Node, ...], name: str) -> Node:
    parameters = {
        "domains": domains, "text": dict(study.text), "model": dict(study.model), "optimizer": dict(study.optimizer),
        "steps": steps, "initial_seed": study.seed, "seed": derive_seed(study.seed, "windows", *domains, len(start)) % 2**31,
    }  # fmt: skip
    return Node("train", "lm.train", parameters, start, name)


def _score(study: Branching, model: Node, name: str) -> Node:
    parameters = {"domains": list(study.domains), "text": dict(study.text), "model": dict(study.model)}
    return Node("score", "lm.score", parameters, (model,), f"score {name}")


def _family(study: Branching, share: float) -> Family:
    seed_steps = round(share * study.steps)
    each = (study.steps - seed_steps) // len(study.domains)
    label = f"{share:.0%} seed"
    start = (_train(study, list(study.domains), seed_steps, (), label),) if seed_steps else ()
    experts = {name: _train(study, [name], each, start, f"{label}: expert {name}") for name in study.domains}
    nodes = tuple(experts.values())
    shared = {"domains": list(study.domains), "text": dict(study.text), "model": dict(study.model)}
    ensemble: dict[str, Node] = {}
    average: dict[str, Node] = {}
    for name in study.domains:
        settings = {**shared, "domain": name, "samples": study.samples, "decay": study.decay}
        posterior = Node("score", "lm.posterior", settings, nodes, f"{label}: posterior on {name}")
        ensemble[name] = Node(
            "score", "lm.ensemble", {**shared, "domain": name}, (posterior, *nodes), f"{label}: ensemble on {name}"
        )
        merged = Node("merge", "lm.mean", {"weighted": True}, (posterior, *nodes), f"{label}: average for {name}")
        average[name] = _score(study, merged, f"{label}: average for {name}")
    uniform = Node("merge", "lm.mean", {"weighted": False}, nodes, f"{label}: uniform average")
    scores = {name: _score(study, node, f"{label}: expert {name}") for name, node in experts.items()}
    return Family(share, experts, scores, ensemble, _score(study, uniform, f"{label}: uniform average"), average)


def domain_posterior(log_likelihoods: Tensor, decay: float) -> Tensor:
    """Return the experts' weights, (experts,): a moving average of their posteriors over samples that come one by one.

    w ← (1 − decay) w + decay · p(expert | sample),  p ∝ w · p(sample | expert),  from uniform weights on.

    Args:
        log_likelihoods: float64 (experts, samples), of whole samples, in nats.
        decay: weight of a new sample.

    >>> domain_posterior(torch.tensor([[0.0, 0.0], [-99.0, -99.0]]).double(), 0.5)
    tensor([0.8750, 0.1250], dtype=torch.float64)
    """
    weights = torch.full((len(log_likelihoods),), 1 / len(log_likelihoods), dtype=torch.float64)
    for sample in log_likelihoods.unbind(1):
        posterior = (weights.log() + sample.double()).softmax(0)
        weights = (1 - decay) * weights + decay * posterior
    return weights / weights.sum()


def mixture_loss(log_likelihoods: Tensor, weights: Tensor) -> float:
    """Return the mean loss in nats a character of the mixture Σ w_j p_j.

    Args:
        log_likelihoods: float64 (experts, ...), of each character.
        weights: (experts,).
    """
    shaped = weights.double().log().reshape(-1, *[1] * (log_likelihoods.ndim - 1))
    return -float((log_likelihoods + shaped).logsumexp(0).mean())
