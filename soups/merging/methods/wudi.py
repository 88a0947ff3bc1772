"""WUDI: one task vector whose rows disturb no task's inputs, which its own task vector stands for.

Whoever started this interference, should end it (arXiv:2503.08099), equation 8: for a linear layer, τ minimises
Σ_t ‖(τ − τ_t) τ_tᵀ‖²_F / ‖τ_t‖²_F, because the inputs of task t lie near the span of τ_t's rows. The published method stops early:
300 steps of Adam at 1e-5 from Σ τ_t, which is part of it and makes it depend on the scale of the weights. `exact=True` is the
minimum itself: RegMean with the Gram matrices τ_tᵀ τ_t / ‖τ_t‖²_F.

Tensors that are no matrices are averaged (FusionBench's choice; the authors leave them at the base model's).

When it fails: Without data it cannot know which directions the inputs really take. The exact minimum undoes the early stop that the
paper's figures rest on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soups.merging.methods.svd import MatrixMethod


@dataclass(frozen=True)
class WUDI(MatrixMethod):
    """τ that minimises Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² for each matrix; other tensors are averaged.

    Attributes:
        exact: take the minimum, not the early stop.
        steps: of Adam.
        lr: its learning rate.
        ridge: for the exact minimum: a multiple of the identity that leaves directions of no task vector at zero, as a share of the mean
            diagonal.
        exclude: patterns of names that are averaged although they are matrices.
        scale: factor of the merged task vector.
    """

    exact: bool = False
    steps: int = 300
    lr: float = 1e-5
    ridge: float = 1e-6
    exclude: tuple[str, ...] = ()
    scale: float = 1.0

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Return the merged task vector (out, in)."""
        wide = [delta.double() for delta in deltas]
        norms = [delta.square().sum() for delta in wide]
        grams = [delta.T @ delta / norm for delta, norm in zip(wide, norms, strict=True) if norm > 0]
        moved = [delta for delta, norm in zip(wide, norms, strict=True) if norm > 0]
        if not moved:
            return torch.zeros_like(deltas[0])
        left = torch.stack(grams).sum(0)
        right = sum((delta @ gram for delta, gram in zip(moved, grams, strict=True)), torch.zeros_like(moved[0]))
        if self.exact:
            left.diagonal().add_(self.ridge * left.diagonal().mean())
            return torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T.to(deltas[0].dtype)
        found = torch.stack(moved).sum(0).requires_grad_()
        optimiser = torch.optim.Adam([found], lr=self.lr)
        for _ in range(self.steps):
            found.grad = 2 * (found.detach() @ left - right)
            optimiser.step()
        return found.detach().to(deltas[0].dtype)
