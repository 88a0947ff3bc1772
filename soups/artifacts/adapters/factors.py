"""The two factors of a module's low-rank change: read from adapters, made from products and matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.lora import AdapterConfig, open_adapter, read_config
from soups.stores.lora.changes import block_diagonal
from soups.stores.lora.contents import Contents, Factors, read_contents
from soups.stores.store import Store


@dataclass(frozen=True)
class Pair:
    """ΔW = B A of one module, the scale included.

    Attributes:
        a: shape (rank, in, kernel …), or (rank, tokens) for an embedding.
        b: shape (out, rank, 1 …), or (features, rank).
        embedding: whether the module is an embedding.
    """

    a: Tensor
    b: Tensor
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.a.shape[0]

    def product(self) -> Tensor:
        """Return ΔW as a matrix, shape (out, in · kernel)."""
        return self.b.flatten(1) @ self.a.flatten(1)

    def like(self, a: Tensor, b: Tensor) -> Pair:
        """Return factors of another rank with this pair's kernel, from matrices (rank, in · kernel) and (out, rank)."""
        return Pair(
            a.reshape(-1, *self.a.shape[1:]), b.reshape(*b.shape, *[1] * (self.b.ndim - 2)), embedding=self.embedding
        )


class Adapter:
    """A LoRA adapter's factors by module. Close it.

    Raises:
        StorageError: the folder holds no adapter, or one whose change is no product of two factors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: AdapterConfig = read_config(folder)
        self.store: Store = open_adapter(folder)
        try:
            self.contents: Contents = read_contents(self.store, str(folder))
            self._check()
        except BaseException:
            self.store.close()
            raise

    def _check(self) -> None:
        reason = (
            "trains rows of an embedding (trainable_token_indices)" if self.contents.rows
            else f"was initialised by {self.config.init}, which changes its base" if self.config.init
            else "adapts stacked experts (target_parameters)" if self.config.target_parameters
            else "shifts biases (lora_bias)" if any("lora_B.bias" in one.keys for one in self.contents.factors.values())
            else None
        )  # fmt: skip
        if reason:
            raise StorageError(
                f"{self.folder} {reason}, which is no product of two factors. Merge it into its base, and merge the models."
            )

    def paths(self) -> list[str]:
        """Return the places of all factors."""
        return list(self.contents.factors)

    def pair(self, path: str) -> Pair:
        """Return a module's factors in float32, the scale on A.

        Raises:
            WeightsError: one of the two is missing, or the rank is not the configuration's.
        """
        factors = self.contents.factors[path]
        embedding = "lora_embedding_A" in factors.keys
        a, b = (self._read(factors, f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
        if a.shape[0] != self.config.rank(factors.module):
            raise WeightsError(
                f"{self.folder}: {path!r} has rank {a.shape[0]}, and the configuration says "
                f"{self.config.rank(factors.module)}. Copy the adapter's two files again."
            )
        first, second, count = self.config.blocks
        a = block_diagonal(a, count if any(part in path for part in first) else 1)
        b = block_diagonal(b, count if any(part in path for part in second) else 1)
        return Pair(a * self.config.scale(factors.module), b, embedding=embedding)

    def _read(self, factors: Factors, kind: str) -> Tensor:
        if kind not in factors.keys:
            raise WeightsError(f"{self.folder}: {factors.path!r} has no {kind}. Copy or make the adapter again.")
        return self.store.read(factors.keys[kind]).float()

    def close(self) -> None:
        """Close the file."""
        self.store.close()


def concatenated(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Return factors of Σ wᵢ Bᵢ Aᵢ, exactly: A's rows and B's columns one after another."""
    a = torch.cat([pair.a * weight for pair, weight in zip(pairs, weights, strict=True)])
    return Pair(a, torch.cat([pair.b for pair in pairs], dim=1), embedding=pairs[0].embedding)


def truncated(pair: Pair, rank: int | None = None, energy: float | None = None) -> Pair:
    """Return the best factors of a lower rank, √σ on either side, without forming the product.

    Args:
        pair: the factors.
        rank: the most columns to keep; None for all.
        energy: the share of Σσ² to keep; None for all of it.
    """
    left, upper = torch.linalg.qr(pair.b.flatten(1).double())
    right, lower = torch.linalg.qr(pair.a.flatten(1).double().T)
    u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _split(pair, left @ u, s, v @ right.T, rank, energy)


def factored(matrix: Tensor, like: Pair, rank: int | None = None, energy: float | None = None) -> Pair:
    """Return the best factors of a matrix (out, in · kernel) by its singular values; see `truncated`."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _split(like, u, s, v, rank, energy)


def _split(like: Pair, u: Tensor, s: Tensor, v: Tensor, rank: int | None, energy: float | None) -> Pair:
    count = min(len(s), rank or len(s))
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
        count = min(count, 1 + int((shares < energy - 1e-12).sum()))
    root = s[:count].sqrt()
    return like.like((root[:, None] * v[:count]).float(), (u[:, :count] * root).float())
