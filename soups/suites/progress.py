"""Bars on standard error while a suite is made."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SuiteProgress:
    """Bars of fits, one after the other.

    Args:
        shown: draw them.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    @contextmanager
    def fit(self, suite: str, what: str, steps: int) -> Generator[Callable[[], None]]:
        """Show a fit of so many steps; yield a function to call after each."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), disable=not self._shown) as display:
            bar = display.add_task(f"{suite}: {what}", total=steps)
            yield lambda: display.advance(bar)

    @contextmanager
    def note(self, suite: str, what: str) -> Generator[None]:
        """Show work whose length is not known."""
        columns = (TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not self._shown) as display:
            display.add_task(f"{suite}: {what}", total=None)
            yield
