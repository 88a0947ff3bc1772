"""Predictions of a model on a split, and the numbers computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn import functional

# What a model takes in: one tensor (images), or named ones (the token ids and attention mask of texts).
Inputs = Tensor | Mapping[str, Tensor]
# Inputs of B samples, and their labels (B,).
Batch = tuple[Inputs, Tensor]


def forward(module: nn.Module, inputs: Inputs, device: torch.device | str | None = None) -> Tensor:
    """Return a model's logits (B, classes) for a batch of inputs, from any library.

    Token ids (B, K, tokens) are K candidates a sample: a model with one output (a reward model) gives each its score, and
    the scores (B, K) are the logits of choosing one, as in the Bradley-Terry model.

    Args:
        module: returns logits, or an object that holds them under `logits` (Hugging Face).
        inputs: one tensor, or those of a mapping by name; moved to `device` if one is given.
        device: where the module is.
    """
    if isinstance(inputs, Tensor):
        output = module(inputs if device is None else inputs.to(device))
        return cast(Tensor, getattr(output, "logits", output))
    candidates = candidates_of(inputs)
    output = module(**{
        name: (value if candidates is None else value.flatten(0, 1)).to(device or value.device)
        for name, value in inputs.items()
    })  # fmt: skip
    logits = cast(Tensor, getattr(output, "logits", output))
    return logits if candidates is None else logits.reshape(-1, candidates)


def candidates_of(inputs: Inputs) -> int | None:
    """Return how many candidate texts a sample has: K for token ids (B, K, tokens), None for one input a sample."""
    if isinstance(inputs, Tensor) or inputs["input_ids"].ndim == 2:
        return None
    return inputs["input_ids"].shape[1]


@torch.inference_mode()
def predict(module: nn.Module, batches: Sequence[Batch], device: torch.device | str = "cpu") -> Tensor:
    """Return logits, float32 (N, classes), of a model in evaluation mode, in the order of the batches.

    Under `torch.distributed` the ranks share the batches and every rank returns all logits. Each batch is computed whole
    on one rank, so that the result has the same bits for any number of ranks and every sample counts once.

    Args:
        module: as `forward` takes it.
        batches: the same on every rank.
        device: where the module is.
    """
    was_training = module.training
    module.eval()
    rank, world = ranks()
    mine = [
        (number, forward(module, inputs, device).float().cpu())
        for number, (inputs, _) in enumerate(batches)
        if number % world == rank
    ]
    module.train(was_training)
    if world > 1:
        gathered: list[list[tuple[int, Tensor]] | None] = [None] * world
        distributed.all_gather_object(gathered, mine)
        mine = sorted((part for parts in gathered if parts for part in parts), key=lambda part: part[0])
    return torch.cat([logits for _, logits in mine])


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) outside `torch.distributed`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Score:
    """Numbers of one model on one split: accuracy in [0, 1], mean cross-entropy in nats, and how many samples."""

    accuracy: float
    loss: float
    count: int


def score(logits: Tensor, labels: Tensor) -> Score:
    """Score logits (N, classes) against labels (N,).

    >>> score(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])).accuracy
    0.5
    """
    right = int((logits.argmax(dim=1) == labels).sum())
    return Score(right / len(labels), float(functional.cross_entropy(logits.double(), labels)), len(labels))


def ensemble(logits: Sequence[Tensor]) -> Tensor:
    """Return the logit ensemble of several models: the mean of their logits, each (N, classes).

    The reference of Model soups (arXiv:2203.05482, section 3): as many forward passes as members.
    """
    total = torch.zeros_like(logits[0], dtype=torch.float64)
    for values in logits:
        total += values
    return (total / len(logits)).float()


def ood_mean(accuracies: Mapping[str, float]) -> float:
    """Return the mean accuracy over the out-of-distribution splits: every split but train, held-out and test.

    >>> round(ood_mean({"test": 0.9, "blur": 0.5, "noise": 0.7}), 3)
    0.6
    """
    values = [value for name, value in accuracies.items() if name not in ("train", "heldout", "test")]
    return sum(values) / len(values) if values else float("nan")
