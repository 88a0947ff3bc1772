"""Learned soup: the shares of the ingredients, found by gradient descent on the held-out loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.recipes.recipe import Candidate, Gradient, Score, Soup, check_choice, ranked
from soups.seeding import generator
from soups.stores import Store
from soups.weights import accumulation_dtype, check_same, is_averaged

GRANULARITIES = ("model", "tensor")


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
    check_choice("per", per, GRANULARITIES)
    if epochs < 1 or not lr > 0:
        raise ConfigError(f"epochs={epochs} must be at least 1 and lr={lr} positive.")
    stores = [candidate.store() for candidate in order]
    try:
        mixture = _Mixture(order, stores, per)
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        logits = mixture.logits
        optimizer = torch.optim.AdamW([logits, factor] if beta else [logits], lr=lr, weight_decay=0.0)
        losses: list[float] = []
        weights = mixture.weights()
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(gradient.batches, generator=generator(seed, "learned", epoch)).tolist():
                slope = gradient(weights, batch, float(factor.detach()))
                optimizer.zero_grad()
                mixture.backward(slope.by_tensor)
                factor.grad = torch.tensor(slope.by_beta, dtype=torch.float64)
                optimizer.step()
                total += slope.loss
                del slope
                mixture.weights(into=weights)
            losses.append(total / gradient.batches)
        shares = mixture.shares()
    finally:
        for store in stores:
            store.close()
    names = [candidate.name for candidate in order]
    overall = mixture.overall()
    coefficients = dict(sorted(zip(names, overall, strict=True), key=lambda item: -item[1]))
    by_tensor = {
        key: dict(zip(names, row, strict=True)) for key, row in zip(mixture.groups, shares.tolist(), strict=True)
    }
    return Soup(
        weights,
        list(coefficients),
        score(weights),
        coefficients=coefficients,
        by_tensor=by_tensor if per == "tensor" else {},
        details={"beta": float(factor.detach()), "loss_by_epoch": losses, "per": per},
    )


class _Mixture:
    """Σᵢ αᵢ θᵢ over stores, tensor by tensor, and the derivative by the logits of α."""

    def __init__(self, candidates: Sequence[Candidate], stores: Sequence[Store], per: str) -> None:
        self.stores = stores
        first = stores[0]
        shapes = [
            {
                key: torch.empty(meta.shape, dtype=meta.dtype, device="meta")
                for key in store
                for meta in [store.meta(key)]
            }
            for store in stores
        ]
        for candidate, found in zip(candidates, shapes, strict=True):
            check_same(shapes[0], found, where=candidate.name)
        self.tied = first.tied()
        self.keys = first.keys()
        self.aliases: dict[str, list[str]] = {}
        for name, key in self.tied.items():
            self.aliases.setdefault(key, []).append(name)
        self.averaged = [key for key in self.keys if key not in self.tied and is_averaged(shapes[0][key])]
        self.sizes = {key: first.meta(key).numel for key in self.averaged}
        self.groups = self.averaged if per == "tensor" else ["model"]
        self.row = {key: number if per == "tensor" else 0 for number, key in enumerate(self.averaged)}
        self.logits = torch.zeros(len(self.groups), len(stores), dtype=torch.float64, requires_grad=True)

    def shares(self) -> Tensor:
        """Return α, (groups, ingredients)."""
        return self.logits.detach().softmax(dim=1)

    def overall(self) -> list[float]:
        """Return each ingredient's share of the whole, tensors weighed by their size."""
        sizes = torch.tensor([self.sizes[key] for key in self.averaged], dtype=torch.float64)
        rows = torch.tensor([self.row[key] for key in self.averaged])
        return ((self.shares()[rows] * sizes[:, None]).sum(0) / sizes.sum()).tolist()

    def weights(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the mixed weights, written over those of `into` when given."""
        result = {} if into is None else into
        shares = self.shares()
        for key in self.keys:
            if key in self.tied:
                result[key] = result[self.tied[key]]
            elif key not in self.row:
                result.setdefault(key, self.stores[0].read(key).clone())
            else:
                row = shares[self.row[key]].tolist()
                first = self.stores[0].read(key)
                total = first.to(accumulation_dtype(first.dtype), copy=True).mul_(row[0])
                for store, share in zip(self.stores[1:], row[1:], strict=True):
                    total.add_(store.read(key), alpha=share)
                if into is None:
                    result[key] = total.to(first.dtype)
                else:
                    result[key].copy_(total)
        return result

    def backward(self, by_tensor: Mapping[str, Tensor]) -> None:
        """Set the gradient of the logits of α from that of the loss by the mixed tensors."""
        slope = torch.zeros_like(self.logits)
        for key in self.averaged:
            name = next((name for name in (key, *self.aliases.get(key, ())) if name in by_tensor), None)
            if name is None:
                continue
            inner = by_tensor[name].detach().cpu().double().reshape(-1)
            for number, store in enumerate(self.stores):
                slope[self.row[key], number] += inner @ store.read_flat(key).double()
        self.logits.grad = None
        self.logits.softmax(dim=1).backward(slope)
