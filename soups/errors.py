"""Errors that a user can act on.

Every message is one paragraph that names the file, key or tensor at fault, what was expected, and the way out.
Programs show these without a traceback; any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SoupError(Exception):
    """Something the user can put right: a wrong setting, a damaged file, an unreachable place."""


class ConfigError(SoupError):
    """A setting that does not exist or does not make sense."""


class DataError(SoupError):
    """Data that is absent, unreadable or not what the task needs."""


class WeightsError(SoupError):
    """Weights that do not fit: missing, unexpected, mis-shaped, of another dtype, or not finite."""


class StorageError(SoupError):
    """A place that cannot be read or written: absent, full, read-only, damaged or half-written."""


class RunError(SoupError):
    """Some or all runs of a sweep or a plan failed, or their processes died."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a hint that ends an error message about an unknown name.

    >>> did_you_mean("optimiser", ["optimizer", "trainer"])
    "did you mean 'optimizer'? Allowed: 'optimizer', 'trainer'."
    >>> did_you_mean("ema", [])
    'there is none to choose from.'
    """
    allowed = list(allowed)
    close = get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(map(repr, allowed))}." if allowed else "there is none to choose from."


def install(extra: str) -> str:
    """Return how to install one of the package's extras; it has not been published, so it is installed from a clone.

    >>> install("ray")
    "in a clone of soups, pip install -e '.[ray]'"
    """
    return f"in a clone of soups, pip install -e '.[{extra}]'"
