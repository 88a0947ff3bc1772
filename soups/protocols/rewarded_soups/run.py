"""`+protocol=rewarded_soups`: policies over rated texts, one for each of two rewards, and the weights between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from soups.errors import ConfigError, did_you_mean
from soups.evaluation import predict
from soups.fitting import FitSpec
from soups.fitting.environment import device_for
from soups.fitting.schema import Count, NotNegative, Section, Target
from soups.fitting.training import train_module
from soups.protocols.execution import Operation, Output, Work
from soups.protocols.fits import batches_of, network_of, node_run, report_progress, trained_weights
from soups.protocols.plan import Node, Parameters, Plan
from soups.protocols.rewarded_soups.interpolation import Shares
from soups.protocols.rewarded_soups.page import ParetoFront
from soups.protocols.rewarded_soups.plan import RewardedNodes, RewardedStudy, interpolation, rewarded_nodes
from soups.protocols.runner import FittingConfiguration, ProtocolRunner
from soups.reporting.page import Page
from soups.stores.pool import Pool
from soups.tasks.data import ShuffledBatches
from soups.tasks.network import Network
from soups.tasks.policies import PolicyTraining, choice_tokens, choices, policy_values
from soups.tasks.preferences import RewardInput, parts
from soups.tasks.rated_texts import DOMAINS, RatedText
from soups.tasks.texts import Texts

REWARDS = ("rating", "brevity")


class ChoosingStudy(RewardedStudy):
    """A study of policies that choose texts.

    Attributes:
        candidates: K texts that a policy chooses from.
        choices: sets of candidates to train on.
        kl: weight of the divergence from the start.
    """

    candidates: int = 4
    choices: Count = 160
    kl: NotNegative = 0.1


class RewardedSettings(Section):
    """The section `protocol`.

    Attributes:
        study: its sizes.
        domain: of `soups.tasks.rated_texts.DOMAINS`.
        split_seed: of the split of its texts.
        texts: training texts.
        test_texts: texts that the policies are judged on, in `test_choices` sets of candidates.
        test_choices: how many sets there are.
    """

    study: ChoosingStudy
    domain: str = "movies"
    split_seed: int = 0
    texts: Count = 400
    test_texts: Count = 300
    test_choices: Count = 5000


class RewardedConfiguration(FittingConfiguration):
    """All settings of the protocol."""

    protocol: RewardedSettings


class PolicyParameters(Parameters):
    """Of ``policy``: the fit, λ, how many training texts there are, and how policies choose among them."""

    fit: FitSpec
    shares: tuple[float, ...]
    texts: int
    candidates: int
    choices: int
    kl: float


class ChoiceParameters(Parameters):
    """Of ``scores``: the model, the test texts, and the size of inputs."""

    model: Target
    data: Target
    size: int
    test_texts: int


class RewardedSoups(ProtocolRunner[RewardedConfiguration]):
    """The protocol of `conf/protocol/rewarded_soups.yaml`.

    The first reward of a text is the mean of its human ratings, the second its brevity (minus the logarithm of its number of
    words); both in standard deviations over the training texts.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "rewarded_soups"
    Configuration = RewardedConfiguration

    def __init__(self, configuration: RewardedConfiguration) -> None:
        super().__init__(configuration)
        own, study = configuration.protocol, configuration.protocol.study
        if own.domain not in DOMAINS:
            raise ConfigError(f"protocol.domain={own.domain}: {did_you_mean(own.domain, DOMAINS)}")
        if study.candidates < 2:
            raise ConfigError(f"protocol.study.candidates={study.candidates} must be at least 2.")
        self.layout = configuration.layout
        data = {"_target_": "soups.tasks.preferences.parts", "domain": own.domain, "seed": own.split_seed}
        self.base = configuration.fit(data)

        def policy(shares: Shares) -> PolicyParameters:
            return PolicyParameters(
                fit=self.base, shares=shares, texts=own.texts, candidates=study.candidates, choices=study.choices,
                kl=study.kl,
            )  # fmt: skip

        scoring = ChoiceParameters(
            model=self.base.model, data=data, size=self.base.loader.size, test_texts=own.test_texts
        )
        self.nodes: RewardedNodes = rewarded_nodes(study, policy, scoring)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.nodes.plan()

    @property
    def shown(self) -> dict[str, Any]:
        """Settings that decide the report alone."""
        return {"test_choices": self.configuration.protocol.test_choices}

    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan names."""
        return {"policy": self._policy, "interpolate": interpolation, "scores": self._scores}

    def texts(self, part: str) -> list[RatedText]:
        """Return the training ("members") or test texts, the latter from short to long."""
        own = self.configuration.protocol
        size = own.texts if part == "members" else own.test_texts
        found = parts(own.domain, own.split_seed)[part][:size]
        if len(found) < size:
            raise ConfigError(
                f"{own.domain} has only {len(found)} texts for this part, fewer than the {size} asked for."
            )
        return found if part == "members" else sorted(found, key=lambda one: len(one.text))

    def rewards(self, part: str) -> Tensor:
        """Return both rewards of each text, (2, N), in standard deviations over the training texts."""

        def raw(texts: list[RatedText]) -> Tensor:
            return torch.tensor([[one.mean, -math.log(len(one.text.split()))] for one in texts]).T

        reference = raw(self.texts("members"))
        centre, scale = reference.mean(dim=1, keepdim=True), reference.std(dim=1, keepdim=True)
        return (raw(self.texts(part)) - centre) / scale

    def _network(self) -> Network:
        """Return the start that all share: the pretrained encoder with a head of zeros, the uniform policy."""
        network = network_of(self.base, 2, seed=self.configuration.seed)
        with torch.no_grad():
            for parameter in network.linear().parameters():
                parameter.zero_()
        return network

    def _policy(self, work: Work) -> Output:
        """Train a policy on λ R₁ + (1 − λ) R₂."""
        parameters = work.read(PolicyParameters)
        spec, seed, network = parameters.fit, parameters.fit.seed, self._network()
        assert isinstance(network.input, RewardInput)
        texts = [one.text for one in self.texts("members")]
        first, second = parameters.shares
        rewards = self.rewards("members")
        mixed = first * rewards[0] + second * rewards[1]
        sets = choices(len(texts), parameters.choices, parameters.candidates, seed)
        dataset = choice_tokens(network.input, texts, mixed, sets, spec.loader.size)
        data = ChoiceBatches(dataset, spec.loader.batch_size, seed)
        module = PolicyTraining(network, spec.optimizer.plain(), parameters.kl)
        with node_run(self.configuration, work) as logger:
            trainer = train_module(spec, self.layout, module, data, [report_progress(work)], logger)
        reward = float(trainer.callback_metrics["train/reward"])
        return Output(trained_weights(network.module), {"train": {"reward": reward}})

    def _scores(self, work: Work) -> Output:
        """Give every test text its score."""
        network = self._network()
        network.module.load_state_dict(work.tensors("policy"), strict=False)
        device = device_for(self.layout.devices)
        texts = [one.text for one in self.texts("test")]
        batches = batches_of(self.base, self.layout, Texts(texts, [0] * len(texts)), network)
        return Output({"scores": predict(network.module.to(device), batches, device)[:, 0].contiguous()})

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        own, found, rewards = self.configuration.protocol, self.nodes, self.rewards("test")
        sets = choices(rewards.shape[1], own.test_choices, own.study.candidates, 0, "test")

        def values(node: Node) -> tuple[float, ...]:
            scores = pool.weights(node.fingerprint)["scores"][sets]
            return tuple(float(policy_values(scores, one[sets])[0]) for one in rewards)

        front = ParetoFront(
            rewards=REWARDS,
            unit="sd",
            start=tuple(float(one.mean()) for one in rewards),  # of the uniform policy
            ends=[values(node) for node in found.ends],
            soups={shares: values(node) for shares, node in found.soups.items()},
            references={shares: values(node) for shares, node in found.references.items()},
        )
        note = "Expected rewards of the policies on test texts, in standard deviations over the training texts."
        return front.page(pool, found, note)


class ChoiceBatches(lightning.LightningDataModule):
    """Training batches of candidate sets, shuffled, each shared by all ranks."""

    def __init__(self, dataset: Any, batch_size: int, seed: int) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the sets of this rank."""
        trainer = self.trainer
        ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = ShuffledBatches(len(self.dataset), self.batch_size, self.seed, *ranks)
        return DataLoader(self.dataset, sampler=sampler, batch_size=None)
