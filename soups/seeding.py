"""Random numbers that depend on what they are for, and on nothing else.

Each stochastic step draws from a generator of its own, derived from the user's seed and the names of the step
(an ingredient's number, a tensor's key, a sample's index). Order of work, chunking, workers and ranks cannot change it.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the step called `names` under the user's `seed`.

    Equal arguments give equal seeds on every machine and in every process (SHA-256, not Python's salted hash).

    >>> derive_seed(0, "sweep", 1) == derive_seed(0, "sweep", 1)
    True
    >>> derive_seed(0, "ab", "c") == derive_seed(0, "a", "bc")
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a `torch.Generator` for the step called `names`, seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))
