"""The SVD family: matrices of task vectors, taken apart into singular vectors and put together without interference.

Each matrix is needed whole. Tensors that are no matrices (biases, norms, convolutions) and those whose names match
`exclude` are averaged.

| method | paper | formula for a matrix |
|---|---|---|
| `TSV` | arXiv:2412.00081, algorithm 1 | top r/T singular triples of each τ_t side by side, U and V made orthogonal |
| `IsoC` | arXiv:2502.04959, equation 7 | SVD of Σ τ_t with its mean singular value in the place of all |
| `IsoCTS` | arXiv:2502.04959, algorithm 2 | the same for a common subspace and task-specific ones beside it |
| `CART` | arXiv:2412.12153, equation 4 | the average plus λ Σ of low-rank parts of θ_t − average |

When it fails: `scale` is chosen on held-out data in the papers, and 1 is not always near the best. With many tasks each keeps few
singular directions. Embeddings and heads gain little: leave them out by `exclude`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from soups.errors import ConfigError
from soups.merging.chunk import Chunk
from soups.merging.method import WholeTensorMethod, weighted_sum
from soups.merging.operands import Operands


class MatrixMethod(WholeTensorMethod):
    """A method given by what it does to one matrix of every model.

    Attributes:
        include: patterns of names of the matrices that are merged as such; all of them when empty.
        exclude: patterns of names that are averaged although they are matrices (`"*embed*"`).
        scale: the factor of the merged task vector.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...]
    scale: float

    def eligible(self, tensor: Chunk | Operands) -> bool:
        """Tell whether this tensor is merged as a matrix."""
        matrix = len(tensor.shape) == 2 and min(tensor.shape) > 0
        included = not self.include or any(fnmatchcase(tensor.key, pattern) for pattern in self.include)
        return matrix and included and not any(fnmatchcase(tensor.key, pattern) for pattern in self.exclude)

    def check_tensor(self, chunk: Chunk) -> None:
        """Check that the parameters suit a matrix; raise a `ConfigError` if they do not."""

    @abstractmethod
    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Merge matrices, shape (m, n) each; the caller scales the result and adds the base."""

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged tensor, flat."""
        assert chunk.base is not None
        deltas = chunk.deltas()
        if self.eligible(chunk):
            self.check_tensor(chunk)
            merged = self.merge_matrices([delta.view(chunk.shape) for delta in deltas]).reshape(-1)
        else:
            merged = average(deltas)
        return merged.mul_(self.scale).add_(chunk.base)


def average(tensors: list[Tensor]) -> Tensor:
    """Return the mean; the first tensor is overwritten."""
    return weighted_sum([1.0] * len(tensors), tensors).div_(len(tensors))


def svd(matrix: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD: U (m, r), S (r,), Vᵀ (r, n), r = min(m, n).

    On a GPU that of float32 matrices is not torch's: cuSOLVER's Jacobi method, torch's choice there, is off by 3e-4 in
    float32, and its other one is slow (`python -m benchmarks.merging_gpu --svd`).

    Args:
        matrix: float32 or float64.
        dtype: of the result; the matrix's when None.
    """
    dtype = dtype or matrix.dtype
    if not matrix.is_cuda:
        u, s, vt = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
    else:
        _load_linalg(matrix.device)
        wide = matrix.dtype == torch.float64
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd") if wide else _svd_by_gram(matrix)
    return u.to(dtype), s.to(dtype), vt.to(dtype)


_loading = threading.Lock()
_loaded: set[torch.device] = set()


def _load_linalg(device: torch.device) -> None:
    """Let torch load its CUDA library of linear algebra: it does so at the first call, and fails if two threads make it."""
    with _loading:
        if device not in _loaded:
            torch.linalg.eigh(torch.eye(2, device=device))
            _loaded.add(device)


def _svd_by_gram(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of a float32 matrix, in float64, through the eigenvectors of the smaller Gram matrix.

    A = U S Vᵀ (m ≤ n): A Aᵀ = U S² Uᵀ in float64 gives U, and AᵀU = V S is made orthonormal by Householder's QR, which
    completes V where singular values vanish. Squaring leaves errors of about 1e-8 of the largest singular value, less than the
    matrix's own rounding to float32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vt = _svd_by_gram(matrix.T)
        return vt.T, s, u.T
    wide = matrix.double()
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)
    v, triangle = torch.linalg.qr(wide.T @ u)
    diagonal = triangle.diagonal()
    return u * torch.where(diagonal < 0, -1.0, 1.0), diagonal.abs(), v.T


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns (the polar factor)."""
    u, _, vt = svd(matrix)
    return u @ vt


@dataclass(frozen=True)
class TSV(MatrixMethod):
    """TSV-M: θ_0 + α U⊥ diag(S) V⊥ᵀ, where U, S, V hold the leading r/T singular triples of every task, side by side.

    Attributes:
        scale: α; the paper chooses it on held-out data, FusionBench takes 1.
        exclude: names to average.
    """

    scale: float = 1.0
    exclude: tuple[str, ...] = ()

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Merge matrices, shape (m, n) each. At least one triple of each task is kept, however many tasks there are."""
        rank = max(1, min(deltas[0].shape) // len(deltas))
        parts = [svd(delta) for delta in deltas]
        u = polar(torch.cat([part[0][:, :rank] for part in parts], dim=1))
        s = torch.cat([part[1][:rank] for part in parts])
        vt = polar(torch.cat([part[2][:rank] for part in parts], dim=0))
        return (u * s) @ vt


@dataclass(frozen=True)
class IsoC(MatrixMethod):
    """Iso-C: θ_0 + α mean(S) U Vᵀ, where U S Vᵀ = Σ τ_t. The nuclear norm of the sum is kept.

    Attributes:
        scale: α, chosen on held-out data.
        exclude: names to average.
    """

    scale: float = 1.0
    exclude: tuple[str, ...] = ()

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Merge matrices, shape (m, n) each."""
        u, s, vt = svd(weighted_sum([1.0] * len(deltas), deltas))
        return s.mean() * (u @ vt)


@dataclass(frozen=True)
class IsoCTS(MatrixMethod):
    """Iso-CTS: a common subspace of the sum, task-specific directions orthogonal to it, one singular value for all.

    Attributes:
        scale: α, chosen on held-out data.
        common: the share of dimensions for the common subspace.
        exclude: names to average.
    """

    scale: float = 1.0
    common: float = 0.8
    exclude: tuple[str, ...] = ()

    def _dimensions(self, rank: int, count: int) -> tuple[int, int]:
        """Return how many dimensions each task has to itself, and how many are common."""
        each = round((rank - int(rank * self.common)) / count)
        return each, rank - each * count

    def check_tensor(self, chunk: Chunk) -> None:
        """Check that the matrix has a dimension for every task that is to have one.

        Raises:
            ConfigError: it has not; the authors' code stops there too.
        """
        rank = min(chunk.shape)
        each, shared = self._dimensions(rank, chunk.count)
        if shared < 0:
            raise ConfigError(
                f"Iso-CTS: {chunk.key!r} has {rank} dimensions, and common={self.common} leaves {each} to each of {chunk.count} "
                f"tasks, which is more. Raise common, or leave this tensor out by exclude, so that it is averaged."
            )

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Merge matrices, shape (m, n) each."""
        count = len(deltas)
        each, shared = self._dimensions(min(deltas[0].shape), count)
        u, s, vt = svd(weighted_sum([1.0] * count, [delta.clone() for delta in deltas]))
        u, s, vt = u[:, :shared], s[:shared], vt[:shared]
        own = [svd(delta - u @ (u.T @ delta)) for delta in deltas]
        all_u = polar(torch.cat([*(part[0][:, :each] for part in own), u], dim=1))
        all_s = torch.cat([*(part[1][:each] for part in own), s])
        all_vt = polar(torch.cat([*(part[2][:each] for part in own), vt], dim=0))
        return all_s.mean() * (all_u @ all_vt)


@dataclass(frozen=True)
class CART(MatrixMethod):
    """CART: θ̄ + λ Σ SVD_k(θ_t − θ̄): task vectors are centred on the average, and only their leading parts are added.

    Attributes:
        scale: λ, the factor of the sum of leading parts.
        rank: ρ; k is int(ρ · min(m, n)), at least 1.
        include: patterns of the matrices to merge; all of them when empty.
        exclude: names to average.
    """

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    scale: float = 2.0
    rank: float = 0.12
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def merge_matrices(self, deltas: list[Tensor]) -> Tensor:
        """Return Σ of the leading parts of centred matrices, shape (m, n) each."""
        rank = max(1, int(self.rank * min(deltas[0].shape)))
        total = torch.zeros_like(deltas[0])
        for delta in deltas:
            u, s, vt = svd(delta)
            total += (u[:, :rank] * s[:rank]) @ vt[:rank]
        return total

    def combine(self, chunk: Chunk, seen: Any) -> Tensor:
        """Return the merged tensor, flat."""
        count = len(chunk.models)
        mean = weighted_sum([1.0] * count, [model.clone() for model in chunk.models]).div_(count)
        if not self.eligible(chunk):
            return mean
        centred = [(model - mean).view(chunk.shape) for model in chunk.models]
        return self.merge_matrices(centred).reshape(-1).mul_(self.scale).add_(mean)


_CART_SETTINGS = {8: (0.12, 2.0), 14: (0.16, 1.5), 20: (0.32, 1.9)}


def cart_official(*, tasks: int = 8) -> CART:
    """The authors' code: only the matrices of attention and MLP layers, with the settings that it has for 8, 14 or 20 tasks.

    Args:
        tasks: which settings: 8 takes ρ = 0.12 and λ = 2, 14 takes 0.16 and 1.5, 20 takes 0.32 and 1.9.

    Raises:
        ConfigError: there are no settings for this number of tasks.
    """
    if tasks not in _CART_SETTINGS:
        raise ConfigError(
            f"cart.official has settings for {sorted(_CART_SETTINGS)} tasks, not {tasks}; use cart with your own."
        )
    rank, scale = _CART_SETTINGS[tasks]
    return CART(scale, rank, ("*attn*", "*mlp*"), ("*ln*", "*bias*"))
