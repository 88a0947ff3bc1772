"""Policies that choose among candidate texts, and their training on rewards by exact policy gradients.

A policy gives each of K candidates a score and chooses by the softmax of the scores. Its expected reward is a sum of K
terms, so the gradient that REINFORCE estimates from samples is computed exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torchmetrics.aggregation import MeanMetric

from soups.evaluation import Inputs, forward
from soups.seeding import generator
from soups.tasks.network import Network
from soups.tasks.optimisation import optimizer_and_schedule
from soups.tasks.preferences import PairTokens, RewardInput


class PolicyTraining(lightning.LightningModule):
    """A policy trained to the largest expected reward, less its divergence from the uniform policy that it starts as.

    Args:
        network: a model with one output; a head of zeros makes it the uniform policy.
        optimizer: as `soups.tasks.optimisation.optimizer_and_schedule` takes it.
        kl: weight of KL(policy ‖ uniform), in rewards a nat.
    """

    def __init__(self, network: Network, optimizer: Mapping[str, Any], kl: float) -> None:
        super().__init__()
        self.model, self.settings, self.kl = network.module, dict(optimizer), kl
        self.reward = MeanMetric()
        self.train()

    def training_step(self, batch: tuple[Inputs, Tensor], batch_index: int) -> Tensor:
        """Return the loss of candidates (B, K, tokens) with rewards (B, K)."""
        inputs, rewards = batch
        reward, divergence = policy_values(forward(self.model, inputs), rewards)
        self.reward.update(reward.detach(), weight=len(rewards))
        self.log("train/reward", self.reward, on_step=False, on_epoch=True, batch_size=len(rewards))
        return self.kl * divergence - reward

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule."""
        return optimizer_and_schedule(self.parameters(), self.settings, self.trainer.estimated_stepping_batches)


def policy_values(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected reward of the softmax policy, and its KL divergence from the uniform one in nats.

    Args:
        scores: (B, K).
        rewards: (B, K).

    >>> reward, divergence = policy_values(torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    >>> float(reward), float(divergence)
    (1.5, 0.0)
    """
    logs = scores.log_softmax(dim=1)
    shares = logs.exp()
    uniform = torch.log(torch.tensor(float(scores.shape[1])))
    return (shares * rewards).sum(dim=1).mean(), ((shares * logs).sum(dim=1) + uniform).mean()


def choices(texts: int, count: int, candidates: int, seed: int, *names: str | int) -> Tensor:
    """Return `count` sets of distinct texts to choose from, int64 (count, candidates)."""
    draws = torch.rand(count, texts, generator=generator(seed, "choices", *names))
    return draws.argsort(dim=1)[:, :candidates]


def choice_tokens(input: RewardInput, texts: Sequence[str], rewards: Tensor, sets: Tensor, size: int) -> PairTokens:
    """Return sets of candidate texts as model input, with their rewards (B, K) in place of labels.

    Args:
        input: of the model.
        texts: N of them.
        rewards: (N,).
        sets: which texts make a set, (S, K).
        size: most tokens of a text.
    """
    ids = input.texts.tokenise(texts, size)
    places = [[ids[number] for number in column] for column in sets.T.tolist()]
    return PairTokens(places, rewards[sets], int(input.texts.tokenizer.pad_token_id))
