"""Run a module's own steps a second time without a trace in logs, metrics and random numbers."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any


@contextlib.contextmanager
def replaced(target: Any, **attributes: Any) -> Generator[None]:
    """Set instance attributes within the block; what was there before comes back, absence included."""
    before = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                object.__setattr__(target, name, before[name])
            else:
                object.__delattr__(target, name)
