"""Learned soup: the shares of the ingredients, found by gradient descent on the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from soups.coefficients import Mixture, TemperedCrossEntropy, descend
from soups.errors import ConfigError
from soups.recipes.recipe import Candidate, Gradient, Score, Soup, check_choice, ranked
from soups.seeding import generator

PER = ("model", "tensor")


def learned(
    candidates: Sequence[Candidate],
    score: Score,
    gradient: Gradient,
    per: str = "model",
    epochs: int = 5,
    lr: float = 0.05,
    beta: bool = True,
    seed: int = 0,
) -> Soup:
    """Return the learned soup of Model soups (arXiv:2203.05482).

    Minimises the held-out cross-entropy of β · f(x; Σᵢ αᵢ θᵢ) over β and α = softmax(a), from β = 1 and equal shares,
    by AdamW without decay. The shares are of whole models, or of each tensor on its own ("by layer" in the paper).

    The authors' code holds all models in memory and differentiates through the mixture. The derivative by a share is an
    inner product, ∂L/∂αᵢ = Σₜ ⟨∂L/∂θₜ, θᵢₜ⟩ over tensors t, so it is enough to stream the ingredients past the
    gradient of the mixed model: memory is the mixed model, its gradient and one tensor of one ingredient, whatever their
    number. A step reads each ingredient twice.

    The held-out split is the training set here: the soup's held-out score is the score of what was fitted to.

    Args:
        candidates: the ingredients.
        score: held-out score of some weights; asked once, at the end.
        gradient: held-out loss and derivatives, batch by batch.
        per: "model" or "tensor". Tensors without a gradient keep equal shares with "tensor".
        epochs: passes over the held-out split.
        lr: of AdamW.
        beta: learn the factor on the logits; it is not part of the soup, which is as accurate without it.
        seed: of the order of the batches.

    Raises:
        ConfigError: no candidates, an unknown granularity, no epochs, or a learning rate that is not positive.
        soups.errors.WeightsError: ingredients that do not fit each other.
    """
    order = ranked(candidates)
    check_choice("per", per, PER)
    if epochs < 1 or not lr > 0:
        raise ConfigError(f"epochs={epochs} must be at least 1 and lr={lr} positive.")
    objective, count = TemperedCrossEntropy(gradient, fit_beta=beta), gradient.batches
    with ExitStack() as stack:
        stores = {candidate.name: stack.enter_context(candidate.store()) for candidate in order}
        mixture = Mixture(None, stores, granularity=per, link="softmax")
        weights, losses = descend(
            mixture,
            objective,
            steps=epochs * count,
            optimiser="adamw",
            lr=lr,
            order=lambda epoch: torch.randperm(count, generator=generator(seed, "learned", epoch)).tolist(),
        )
        by_epoch = [sum(losses[first : first + count]) / count for first in range(0, len(losses), count)]
        shares = dict(zip(mixture.names, mixture.overall(), strict=True))
        coefficients = dict(sorted(shares.items(), key=lambda item: -item[1]))
        by_tensor = mixture.by_tensor() if per == "tensor" else {}
    return Soup(
        weights,
        list(coefficients),
        score(weights),
        coefficients=coefficients,
        by_tensor=by_tensor,
        details={"beta": float(objective.beta.detach()), "loss_by_epoch": by_epoch, "per": per},
    )
