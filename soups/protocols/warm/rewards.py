"""Rewards that one model gives to texts, their ensemble, and how well they order texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soups.evaluation import pair_accuracy


@dataclass(frozen=True)
class Rewards:
    """Rewards of one model: of the texts of each split (N,), and of the training pairs (P, 2)."""

    texts: Mapping[str, Tensor]
    pairs: Tensor

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Rewards:
        """Read the tensors of a score node."""
        texts = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("texts/")}
        return Rewards(texts, tensors["pairs"])

    @staticmethod
    def together(rewards: Sequence[Rewards], how: str = "mean") -> Rewards:
        """Return the mean (prediction ensemble) or the median of several models' rewards, text by text."""

        def reduce(values: Sequence[Tensor]) -> Tensor:
            stacked = torch.stack([value.double() for value in values])
            return stacked.mean(dim=0) if how == "mean" else stacked.quantile(0.5, dim=0)

        texts = {name: reduce([one.texts[name] for one in rewards]) for name in rewards[0].texts}
        return Rewards(texts, reduce([one.pairs for one in rewards]))

    def accuracy(self, means: Mapping[str, Tensor], gap: float) -> dict[str, float]:
        """Return the share of all pairs that are ordered as the mean ratings are, by split."""
        return {name: pair_accuracy(self.texts[name], means[name], gap)[0] for name in means}

    def agreement(self, labels: Tensor, among: Tensor) -> float | None:
        """Return how often the training labels are reproduced among some training pairs; None where there are none."""
        if not among.any():
            return None
        chosen = (self.pairs[:, 1] > self.pairs[:, 0]).long()
        return float((chosen == labels)[among].double().mean())
