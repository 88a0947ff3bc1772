"""The plan of Branch-Train-Merge: a seed phase, one expert a domain from it, then an ensemble or an average of experts.

The weight of an expert on some text is its domain's posterior probability, estimated once on a few development samples.

- ``lm.train`` trains a model on domains; ``lm.posterior`` weights the experts on one domain's development text;
- ``lm.mean`` averages experts, uniformly or by a posterior;
- ``lm.score`` measures the perplexity of a model on every domain, ``lm.ensemble`` that of the mixture on one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from soups.errors import ConfigError
from soups.fitting.schema import Count, Must, NotNegative, Positive, Section, Share, ShareBelowOne
from soups.fitting.spec import Optimizer
from soups.protocols.plan import Node, Parameters, Plan
from soups.seeding import derive_seed


class DomainText(Section):
    """How much text of each domain there is, in characters, and how many windows of its test text are scored."""

    characters: Count | None = None
    windows: Count = 256


class CharacterModel(Section):
    """Sizes of `soups.tasks.language_modelling.Transformer`."""

    context: Count = 64
    width: Count = 64
    layers: Count = 2
    heads: Count = 4


class WindowOptimizer(Optimizer):
    """The optimiser of every run; `batch` windows a step, gradients clipped to the norm `clip`."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 2e-3
    weight_decay: NotNegative = 0.1
    warmup: Share = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: Share = 0.1
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    batch: Count = 32
    clip: NotNegative | None = None


class BranchSettings(Section):
    """The section `protocol`.

    Attributes:
        domains: names, one expert each.
        text, model, optimizer: of every run.
        steps: of the whole budget, in steps of one batch.
        seed_shares: shares of the budget for the seed phase, one study each; the rest is shared out among the experts.
        samples: development windows for the posterior.
        decay: weight of a new sample in its moving average.
    """

    domains: list[str]
    text: DomainText = Field(default_factory=DomainText)
    model: CharacterModel = Field(default_factory=CharacterModel)
    optimizer: WindowOptimizer = Field(default_factory=WindowOptimizer)
    steps: Count
    seed_shares: Annotated[list[ShareBelowOne], Must("shares in [0, 1)")]
    samples: Count = 100
    decay: Annotated[float, Field(gt=0, le=1), Must("a number in (0, 1]")] = 0.3

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: naming the setting.
        """
        if len(self.domains) < 2:
            raise ConfigError(f"protocol.domains names {len(self.domains)} domains; at least 2 are needed.")
        if self.steps < 2 * len(self.domains):
            raise ConfigError(
                f"protocol.steps={self.steps} leaves nothing to share out among {len(self.domains)} experts."
            )


class TrainParameters(Parameters):
    """Of ``lm.train``: the domains, text, model, optimiser, steps, seeds of the first weights and of the windows, precision."""

    domains: list[str]
    text: DomainText
    model: CharacterModel
    optimizer: WindowOptimizer
    steps: int
    initial_seed: int
    seed: int
    precision: str


class ScoreParameters(Parameters):
    """Of ``lm.score`` and ``lm.ensemble``: the domains to score, the text and the model."""

    domains: list[str]
    text: DomainText
    model: CharacterModel


class PosteriorParameters(Parameters):
    """Of ``lm.posterior``: the domain whose development text weights the experts, and how."""

    domain: str
    text: DomainText
    model: CharacterModel
    samples: int
    decay: float


@dataclass(frozen=True)
class Branch:
    """The nodes of one seed share: scores by domain of each way to use the experts."""

    share: float
    experts: dict[str, Node]
    expert: dict[str, Node]
    ensemble: dict[str, Node]
    uniform: Node
    posterior_average: dict[str, Node]

    @property
    def label(self) -> str:
        """What people are shown."""
        return f"{self.share:.0%} seed"


@dataclass(frozen=True)
class BranchNodes:
    """The dense model's scores and each branch's."""

    dense: Node
    branches: list[Branch]

    def plan(self) -> Plan:
        """Return the plan."""
        scores: list[Node] = [self.dense]
        for branch in self.branches:
            scores += [branch.uniform, *branch.expert.values(), *branch.ensemble.values()]
            scores += branch.posterior_average.values()
        return Plan(tuple(scores))


@dataclass(frozen=True)
class _Study:
    settings: BranchSettings
    seed: int
    precision: str

    def train(self, domains: Sequence[str], steps: int, start: dict[str, Node], name: str) -> Node:
        own = self.settings
        parameters = TrainParameters(
            domains=list(domains),
            text=own.text,
            model=own.model,
            optimizer=own.optimizer,
            steps=steps,
            initial_seed=self.seed,
            seed=derive_seed(self.seed, "windows", *domains, len(start)) % 2**31,
            precision=self.precision,
        )
        return Node("train", "lm.train", parameters, start, name)

    def score(self, model: Node, name: str) -> Node:
        own = self.settings
        parameters = ScoreParameters(domains=own.domains, text=own.text, model=own.model)
        return Node("score", "lm.score", parameters, {"model": model}, f"score {name}")

    def branch(self, share: float) -> Branch:
        own, label = self.settings, f"{share:.0%} seed"
        seed_steps = round(share * own.steps)
        each = (own.steps - seed_steps) // len(own.domains)
        start = {"start": self.train(own.domains, seed_steps, {}, label)} if seed_steps else {}
        experts = {name: self.train([name], each, start, f"{label}: expert {name}") for name in own.domains}
        ensemble: dict[str, Node] = {}
        average: dict[str, Node] = {}
        for name in own.domains:
            estimate = PosteriorParameters(
                domain=name, text=own.text, model=own.model, samples=own.samples, decay=own.decay
            )
            among: dict[str, Any] = {"experts": tuple(experts.values())}
            posterior = Node("score", "lm.posterior", estimate, among, f"{label}: posterior on {name}")
            inputs = {"posterior": posterior, **among}
            scored = ScoreParameters(domains=[name], text=own.text, model=own.model)
            ensemble[name] = Node("score", "lm.ensemble", scored, inputs, f"{label}: ensemble on {name}")
            merged = Node("merge", "lm.mean", {}, inputs, f"{label}: average for {name}")
            average[name] = self.score(merged, f"{label}: average for {name}")
        uniform = Node("merge", "lm.mean", {}, {"experts": tuple(experts.values())}, f"{label}: uniform average")
        scores = {name: self.score(node, f"{label}: expert {name}") for name, node in experts.items()}
        return Branch(share, experts, scores, ensemble, self.score(uniform, f"{label}: uniform average"), average)


def branch_nodes(settings: BranchSettings, seed: int, precision: str) -> BranchNodes:
    """Return the nodes of a study.

    Args:
        settings: of the protocol.
        seed: of initial weights and data.
        precision: of Lightning's Trainer.

    Raises:
        ConfigError: see `BranchSettings.check`.
    """
    settings.check()
    study = _Study(settings, seed, precision)
    dense = study.train(settings.domains, settings.steps, {}, "dense")
    return BranchNodes(study.score(dense, "dense"), [study.branch(share) for share in settings.seed_shares])
