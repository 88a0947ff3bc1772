"""Resolvers that a program registers: it may do so in every run, though one process runs it several times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

# Names that an earlier run in this process registered.
_known: set[str] = set()


@contextlib.contextmanager
def registering_again() -> Generator[None]:
    """Within the block a resolver that an earlier block registered may be registered once more, and replaces that one."""
    original = cast(Callable[..., None], OmegaConf.register_new_resolver)
    before = set(BaseContainer._resolvers)  # pyright: ignore[reportPrivateUsage]
    stale = _known & before

    def register(name: str, resolver: Any, *, replace: bool = False, use_cache: bool = False) -> None:
        original(name, resolver, replace=replace or name in stale, use_cache=use_cache)
        stale.discard(name)

    OmegaConf.register_new_resolver = staticmethod(register)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver = staticmethod(original)
        _known.update(set(BaseContainer._resolvers) - before)  # pyright: ignore[reportPrivateUsage]
