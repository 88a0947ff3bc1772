"""Post-hoc EMA: choose the length of an average after training has ended.

Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv:2312.02696), section 3.2: while training, two
power-function averages are snapshotted now and then; afterwards any other profile (another power function, an EMA, a SWA or
LAWA window) is approximated by the linear combination of snapshots whose own profile is closest in least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from soups.averaging.power import sigma_of
from soups.averaging.profiles import Array, Power, Profile
from soups.averaging.snapshots import Snapshot, Snapshots
from soups.errors import ConfigError, DataError
from soups.reduction import accumulation_dtype
from soups.weights import Weights, is_averaged

# Steps are binned above this many; profiles are smooth, so the fit does not notice (checked in the tests).
BINS = 8192


@dataclass(frozen=True)
class ProfileFit:
    """A profile written as a combination of others.

    Attributes:
        coefficients: (n,) one a snapshot; they sum to one and may be negative.
        residual: ‖found - wanted‖₂ / ‖wanted‖₂ over the steps; 0 is exact.
        misplaced: share of the weight that lies at wrong steps, ½ ‖found - wanted‖₁, from 0 to 1 and above.
        amplification: Σ|coefficient|: how much rounding noise in the snapshots grows.
    """

    coefficients: Array
    residual: float
    misplaced: float
    amplification: float


def solve(basis: Sequence[Profile], wanted: Profile) -> ProfileFit:
    """Find the combination of `basis` closest to `wanted` in least squares, with coefficients that sum to one.

    Args:
        basis: profiles of the snapshots.
        wanted: the profile to approximate.

    Raises:
        ConfigError: no snapshots, or a profile that ends after the last of them.
    """
    if not basis:
        raise ConfigError("There are no snapshots to combine. Train with the PostHocEMA callback first.")
    end = max(profile.end for profile in basis)
    if wanted.end > end:
        raise ConfigError(f"The profile ends at step {wanted.end}, and the last snapshot was taken at step {end}.")
    edges = np.arange(end + 1, dtype=np.float64)
    if end > BINS:
        ends = [0, wanted.end, *(profile.end for profile in basis)]
        edges = np.unique(np.concatenate([np.round(np.linspace(0, end, BINS)), ends]))
    # A bin's weight spread evenly over its steps has the norm weight / sqrt(width).
    scale = 1 / np.sqrt(np.diff(edges))
    columns = np.stack([np.diff(profile.share(edges)) for profile in basis], axis=1)
    target = np.diff(wanted.share(edges))
    coefficients = _constrained(columns * scale[:, None], target * scale)
    error = columns @ coefficients - target
    return ProfileFit(
        coefficients,
        float(np.linalg.norm(error * scale) / np.linalg.norm(target * scale)),
        float(np.abs(error).sum() / 2),
        float(np.abs(coefficients).sum()),
    )


def _constrained(matrix: Array, target: Array) -> Array:
    """Minimise ‖matrix x - target‖ with sum(x) = 1: the sum is eliminated, so it holds exactly."""
    count = matrix.shape[1]
    if count == 1:
        return np.ones(1)
    start = np.full(count, 1 / count)
    # Orthonormal directions along which the sum does not change.
    free = np.linalg.svd(np.ones((1, count)))[2][1:].T
    moves = np.linalg.lstsq(matrix @ free, target - matrix @ start, rcond=1e-12)[0]
    found = start + free @ moves
    return found / found.sum()


@dataclass(frozen=True)
class Synthesis:
    """Weights made from snapshots, and how well their profile fits."""

    weights: dict[str, torch.Tensor]
    fit: ProfileFit
    profile: Profile


class PostHoc:
    """The snapshots of one run, ready to be combined.

    Args:
        folder: where the `PostHocEMA` callback, or `Snapshots.save`, put them.
        name: the name of the average they belong to.

    Raises:
        DataError: the folder holds no such snapshots.
    """

    def __init__(self, folder: str | Path, name: str = "posthoc") -> None:
        self.snapshots: list[Snapshot] = [
            snapshot
            for snapshot in Snapshots(folder).list()
            if snapshot.profile.startswith(f"{name}@") and "gamma" in snapshot.facts
        ]
        if not self.snapshots:
            raise DataError(
                f"{folder} holds no snapshots of a post-hoc EMA called {name!r}. Train with PostHocEMA(folder=...), "
                f"and name the same folder here."
            )
        # Profiles count updates: with an interval of k steps between updates, step k n is update n.
        self.interval = int(self.snapshots[0].facts.get("interval", 1))
        self.basis = [
            Power(sigma_of(snapshot.facts["gamma"]), int(snapshot.facts["count"])) for snapshot in self.snapshots
        ]

    @property
    def end(self) -> int:
        """Updates that the last snapshot has seen; profiles are counted in them."""
        return max(profile.end for profile in self.basis)

    def fit(self, profile: Profile) -> ProfileFit:
        """Return how well a profile can be reached, without reading any weights."""
        return solve(self.basis, profile)

    @torch.no_grad()
    def synthesize(self, profile: Profile) -> Synthesis:
        """Return the weights that an average with this profile would have, as closely as the snapshots allow.

        Memory: one accumulator and one tensor of one snapshot at a time.

        Raises:
            ConfigError: the profile ends after the last snapshot.
        """
        fit = self.fit(profile)
        weights: dict[str, torch.Tensor] = {}
        stores = [snapshot.open() for snapshot in self.snapshots]
        try:
            for key in stores[-1]:
                last = stores[-1].read(key)
                if not is_averaged(last):
                    weights[key] = last
                    continue
                total = torch.zeros_like(last, dtype=accumulation_dtype(last.dtype))
                for store, coefficient in zip(stores, fit.coefficients, strict=True):
                    total.add_(store.read(key).to(total.dtype), alpha=float(coefficient))
                weights[key] = total.to(torch.float32 if last.dtype.itemsize < 4 else last.dtype)
        finally:
            for store in stores:
                store.close()
        return Synthesis(weights, fit, profile)

    def sweep(
        self, profiles: Sequence[Profile], score: Callable[[Weights], float], *, higher_is_better: bool = False
    ) -> tuple[Synthesis, list[tuple[Profile, ProfileFit, float]]]:
        """Score every profile on held-out data and return the best one with the scores of all.

        Args:
            profiles: what to try, for instance `[Power(s, run.end) for s in (0.03, 0.05, 0.1, 0.2)]`.
            score: from weights to a number on a held-out split; never the test split.
            higher_is_better: whether `score` is an accuracy rather than a loss.
        """
        rows: list[tuple[Profile, ProfileFit, float]] = []
        for profile in profiles:
            made = self.synthesize(profile)
            rows.append((profile, made.fit, float(score(made.weights))))
        best = (max if higher_is_better else min)(rows, key=lambda row: row[2])
        return self.synthesize(best[0]), rows
