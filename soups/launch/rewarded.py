"""`+protocol=rewarded_soups`: policies over rated texts, one for each of two rewards, and everything between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from soups.errors import ConfigError
from soups.evaluation import predict
from soups.launch.front import Front
from soups.launch.progress import ReportProgress
from soups.launch.settings import LAYOUT, TRAINING_VERSION, Settings, build_network, check
from soups.launch.start import device_for, evaluation_batches
from soups.launch.tracking import node_run
from soups.launch.training import train_module
from soups.protocols import Node, Operation, Output, Plan, Work
from soups.protocols.rewarded import Choosing, Layout, interpolation, layout, shares_of
from soups.reporting.page import Page
from soups.stores.pool import Pool
from soups.tasks.data import ShuffledBatches
from soups.tasks.network import Network
from soups.tasks.policies import PolicyTraining, choice_tokens, choices, policy_values
from soups.tasks.preferences import RewardInput, parts
from soups.tasks.rated_texts import DOMAINS, RatedText
from soups.tasks.texts import Texts

REWARDS = ("rating", "brevity")


class RewardedSoups:
    """The protocol of `conf/protocol/rewarded_soups.yaml`.

    The first reward of a text is the mean of its human ratings, the second its brevity (minus the logarithm of its number of
    words); both in standard deviations over the training texts.

    Args:
        settings: all settings; `data` names the domain and the split's seed.
        study: fields of `soups.protocols.rewarded.Choosing`.
        texts: training texts.
        test_texts: texts that the policies are judged on, in `test_choices` sets of candidates.
        test_choices: those sets.

    Raises:
        ConfigError: a setting that does not make sense.
    """

    name = "rewarded_soups"

    def __init__(
        self,
        settings: Settings,
        study: Mapping[str, Any],
        domain: str = "movies",
        split_seed: int = 0,
        texts: int = 400,
        test_texts: int = 300,
        test_choices: int = 5000,
    ) -> None:
        check(settings)
        if domain not in DOMAINS:
            raise ConfigError(f"protocol.domain={domain} must be one of {', '.join(DOMAINS)}.")
        self.settings, self.study = settings, Choosing(**study)
        self.domain, self.split_seed = domain, split_seed
        self.sizes = {"texts": texts, "test_texts": test_texts, "test_choices": test_choices}

    def layout(self) -> Layout:
        """Return the nodes."""
        settings = self.settings
        common = {
            "training_version": TRAINING_VERSION,
            "model": settings["model"],
            "optimizer": settings["optimizer"],
            "trainer": {key: value for key, value in settings["trainer"].items() if key not in LAYOUT},
            "size": settings["loader"]["size"],
            "batch_size": settings["loader"]["batch_size"],
            "domain": self.domain,
            "split_seed": self.split_seed,
            "texts": self.sizes["texts"],
            "candidates": self.study.candidates,
            "choices": self.study.choices,
            "kl": self.study.kl,
        }
        kept = ("model", "size", "domain", "split_seed")
        scoring = {**{key: common[key] for key in kept}, "test_texts": self.sizes["test_texts"]}
        return layout(self.study, common, scoring)

    def plan(self) -> Plan:
        """Return the plan."""
        return self.layout().plan()

    def operations(self) -> Mapping[str, Operation]:
        """Return what the plan's nodes do."""
        return {"policy": self._policy, "interpolate": interpolation, "scores": self._scores}

    def texts(self, part: str) -> list[RatedText]:
        """Return the training ("members") or test texts, the latter from short to long."""
        size = self.sizes["texts" if part == "members" else "test_texts"]
        found = parts(self.domain, self.split_seed)[part][:size]
        if len(found) < size:
            raise ConfigError(
                f"{self.domain} has only {len(found)} texts for this part, fewer than the {size} asked for."
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
        network = build_network(self.settings, 2)
        with torch.no_grad():
            for parameter in network.linear().parameters():
                parameter.zero_()
        return network

    def _policy(self, work: Work) -> Output:
        """Train a policy on λ R₁ + (1 − λ) R₂."""
        seed = int(work.parameters["seed"])
        network = self._network()
        assert isinstance(network.input, RewardInput)
        texts = [one.text for one in self.texts("members")]
        first, second = shares_of(work)
        rewards = self.rewards("members")
        mixed = first * rewards[0] + second * rewards[1]
        sets = choices(len(texts), self.study.choices, self.study.candidates, seed)
        dataset = choice_tokens(network.input, texts, mixed, sets, int(self.settings["loader"]["size"]))
        data = Choices(dataset, int(self.settings["loader"]["batch_size"]), seed)
        module = PolicyTraining(network, self.settings["optimizer"], self.study.kl)
        own = {**self.settings, "seed": seed}
        with node_run(own, work) as logger:
            trainer = train_module(own, module, data, [ReportProgress(work.pool, work.node.fingerprint)], logger)
        reward = float(trainer.callback_metrics["train/reward"])
        trained = {
            name: parameter.detach().cpu().clone().contiguous()
            for name, parameter in network.module.named_parameters()
            if parameter.requires_grad
        }
        return Output(trained, {"train": {"reward": reward}})

    def _scores(self, work: Work) -> Output:
        """Give every test text its score."""
        network = self._network()
        network.module.load_state_dict(work.tensors(0), strict=False)
        device = device_for(self.settings)
        texts = [one.text for one in self.texts("test")]
        batches = evaluation_batches(self.settings, Texts(texts, [0] * len(texts)), network)
        return Output({"scores": predict(network.module.to(device), batches, device)[:, 0].contiguous()})

    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report."""
        del plan
        found = self.layout()
        rewards = self.rewards("test")
        sets = choices(rewards.shape[1], self.sizes["test_choices"], self.study.candidates, 0, "test")

        def values(node: Node) -> tuple[float, ...]:
            scores = pool.weights(node.fingerprint)["scores"][sets]
            return tuple(float(policy_values(scores, one[sets])[0]) for one in rewards)

        front = Front(
            rewards=REWARDS,
            unit="sd",
            start=tuple(float(one.mean()) for one in rewards),  # of the uniform policy
            ends=[values(node) for node in found.ends],
            soups={shares: values(node) for shares, node in found.soups.items()},
            references={shares: values(node) for shares, node in found.references.items()},
        )
        return front.page(
            pool,
            found,
            "Expected rewards of the policies on test texts, in standard deviations over the training texts.",
        )


class Choices(lightning.LightningDataModule):
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
