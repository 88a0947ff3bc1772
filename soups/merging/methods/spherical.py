"""Averages on the sphere: SLERP, NuSLERP, multi-SLERP and the Karcher mean; norms are averaged apart from directions.

SLERP: Shoemake, SIGGRAPH 1985. Karcher mean: the point with the least sum of squared angles, by fixed-point iteration.
All are linear combinations of their inputs, tensor by tensor, with coefficients from the inner products (`GramMethod`).

When it fails: A tensor is treated as one direction, which means little for biases and norms; and opposite directions have no mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk, Unit
from soups.merging.gram import GramMethod, Matrix, Vector, norms_and_units
from soups.merging.method import PerModel, Scope, per_model
from soups.merging.operands import Operands


def slerp_coefficients(cosine: float, t: float) -> tuple[float, float]:
    """Return (sin((1 − t)Ω) / sin Ω, sin(tΩ) / sin Ω) for the angle Ω with the given cosine, and its limit (1 − t, t).

    >>> slerp_coefficients(0.0, 0.5)[0] == slerp_coefficients(0.0, 0.5)[1]
    True
    >>> slerp_coefficients(1.0, 0.25)
    (0.75, 0.25)
    """
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    sine = float(np.sin(angle))
    if sine < 1e-8:
        return 1.0 - t, t
    return float(np.sin((1.0 - t) * angle)) / sine, float(np.sin(t * angle)) / sine


@dataclass(frozen=True)
class Slerp(GramMethod):
    """Spherical interpolation between the base and one model.

    θ = (sin((1 − t)Ω) θ_0 + sin(tΩ) θ_1) / sin Ω, with Ω the angle between the two tensors as wholes.

    Attributes:
        t: 0 is the base, 1 the model.
        straight: interpolate linearly when |cos Ω| is above this, as mergekit does; 1 never does while it can be avoided.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    most: ClassVar[int | None] = 1
    t: float = 0.5
    straight: float = 0.9995

    def vectors(self, chunk: Chunk) -> list[Tensor]:
        """Return the base and the model themselves."""
        assert chunk.base is not None
        return [chunk.base, *chunk.models]

    def coefficients(self, gram: Matrix) -> Vector:
        """Return the two shares; the base's is for itself, as the sum below adds no base."""
        cosine = float(norms_and_units(gram)[1][0, 1])
        if abs(cosine) > self.straight:
            return np.array([1.0 - self.t, self.t])
        return np.array(slerp_coefficients(cosine, self.t))

    def combine(self, chunk: Chunk, seen: Vector) -> Tensor:
        """Return the interpolation."""
        assert chunk.base is not None
        return chunk.models[0].mul_(float(seen[1])).add_(chunk.base.mul_(float(seen[0])))


@dataclass(frozen=True)
class NuSlerp(GramMethod):
    """SLERP between two models, or their task vectors when there is a base, by weights (mergekit's `nuslerp`).

    Attributes:
        weight: of each model; t is the second one's share. Two weights that cancel mean one half.
        flatten: one angle for the tensor; otherwise one for each row.
        row_wise: without `flatten`, one angle for each column instead (mergekit's name for it).
    """

    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    weight: PerModel = 1.0
    flatten: bool = True
    row_wise: bool = False

    @property
    def unit(self) -> Unit:
        """What shares an angle must be whole."""
        return "element" if self.flatten else "tensor" if self.row_wise else "row"

    @property
    def scope(self) -> Scope:
        """What shares an angle."""
        return "row" if self.unit == "row" else "tensor"

    @property
    def t(self) -> float:
        """The second model's share."""
        first, second = per_model(self.weight, 2)
        total = first + second
        return 0.5 if abs(total) < 1e-6 else second / total

    def coefficients(self, gram: Matrix) -> Vector:
        """Return the two shares."""
        return np.array(slerp_coefficients(float(norms_and_units(gram, 1e-7)[1][0, 1]), self.t))

    def observe(self, operands: Operands) -> Any:
        """Find the tensor's coefficients; rows and columns need nothing beforehand."""
        return super().observe(operands) if self.flatten else None

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged chunk."""
        if self.flatten:
            return super().combine(chunk, seen)
        columns = self.row_wise and len(chunk.shape) > 1
        axis = 0 if columns else 1
        shape = (math.prod(chunk.shape[:1]) if columns else -1, -1 if columns else max(1, chunk.width))
        one, two = (vector.view(shape) for vector in self.vectors(chunk))
        units = [v / v.norm(dim=axis, keepdim=True).clamp_(min=1e-7) for v in (one, two)]
        angle = torch.acos((units[0] * units[1]).sum(dim=axis, keepdim=True).clamp_(-1, 1))
        sine, straight = torch.sin(angle), torch.sin(angle).abs() < 1e-8
        shares = [torch.where(straight, s, torch.sin(s * angle) / sine) for s in (1 - self.t, self.t)]
        merged = (one.mul_(shares[0])).add_(two.mul_(shares[1])).reshape(-1)
        return merged if chunk.base is None else merged.add_(chunk.base)


@dataclass(frozen=True)
class MultiSlerp(GramMethod):
    """A barycentre on the sphere, in the tangent space at the normalised mean direction.

    m = Σ w_i u_i / |·|;  v = Σ w_i (u_i − ⟨u_i, m⟩ m);  θ = (cos|v| m + sin|v| v/|v|) · Σ w_i |x_i|.

    Attributes:
        weight: one for all models or one for each.
        normalize: divide the weights by their sum.
        eps: added to norms.
    """

    weight: PerModel = 1.0
    normalize: bool = True
    eps: float = 1e-8

    def coefficients(self, gram: Matrix) -> Vector:
        """Return the coefficients of x."""
        weights = np.array(per_model(self.weight, len(gram)))
        if self.normalize:
            if weights.sum() == 0:
                raise ConfigError("The weights sum to zero, so they cannot be normalised; set normalize=false.")
            weights = weights / weights.sum()
        if len(gram) == 1:
            return np.ones(1)
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        inverse = 1.0 / (norms + self.eps)
        units = gram * inverse[:, None] * inverse[None, :]
        length = float(np.sqrt(max(weights @ units @ weights, 0.0)))
        if length < self.eps:  # opposite directions have no mean on the sphere
            return weights
        mean = weights / length
        tangent = weights - float(weights @ (units @ mean)) * mean
        size = float(np.sqrt(max(tangent @ units @ tangent, 0.0))) + self.eps
        direction = np.cos(size) * mean + np.sin(size) / size * tangent
        return direction * inverse * float(weights @ norms)


@dataclass(frozen=True)
class Karcher(GramMethod):
    """The Karcher (Riemannian) mean of directions, times the mean norm; equal or given weights.

    u ← exp_u(Σ α_i log_u u_i) from the normalised mean, until a step is shorter than `tol`.

    Attributes:
        weight: one for all models or one for each; normalised.
        max_iter: most iterations.
        tol: length of a step, in radians, that is taken for none.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    weight: PerModel = 1.0
    max_iter: int = 10
    tol: float = 1e-5

    def coefficients(self, gram: Matrix) -> Vector:
        """Return the coefficients of the models."""
        alphas = np.array(per_model(self.weight, len(gram)))
        alphas = alphas / alphas.sum()
        norms, units = norms_and_units(gram, 1e-30)
        there = norms > self.tol
        if not there.any():
            return np.zeros(len(gram))
        shares = np.where(there, alphas, 0.0)
        shares = shares / shares.sum()
        length = float(np.sqrt(max(shares @ units @ shares, 0.0)))
        mean = shares / length if length > self.tol else np.eye(len(gram))[int(np.argmax(there))]
        for _ in range(self.max_iter):
            cosines = np.clip(units @ mean, -1.0, 1.0)
            angles = np.where(there, np.arccos(cosines), 0.0)
            sines = np.sin(angles)
            factors = np.where(sines > 1e-12, shares * angles / np.maximum(sines, 1e-12), 0.0)
            tangent = factors - float(factors @ cosines) * mean
            step = float(np.sqrt(max(tangent @ units @ tangent, 0.0)))
            if step < self.tol:
                break
            mean = np.cos(step) * mean + np.sin(step) / step * tangent
            mean = mean / np.sqrt(mean @ units @ mean)
        scale = float(shares @ norms)
        return mean * scale / np.maximum(norms, 1e-30)
