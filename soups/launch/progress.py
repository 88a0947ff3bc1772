"""How far the runs of a sweep are, on any launcher: one display reads the progress files that runs leave in the pool."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from soups.errors import StorageError
from soups.fitting.progress import LOCAL, REMOTE
from soups.stores.pool import Failure, Ingredient, Pool


class SweepProgress:
    """A live display of a sweep: finished ingredients, those in progress, and the time left.

    Args:
        pool: where the runs leave their progress.
        names: fingerprints that are to be made.
        labels: what to call each.
        found: how many were there before.
        noun: what they are called together.
        describe: what is said of a finished one.
    """

    def __init__(
        self, pool: Pool, names: list[str], labels: dict[str, str], found: int, noun: str = "ingredients",
        describe: Callable[[Ingredient], str] = lambda record: f"held-out {record.heldout():.2%}",
    ) -> None:  # fmt: skip
        self.pool, self.names, self.labels, self.found = pool, names, labels, found
        self.noun, self.describe = noun, describe
        self.console = Console(stderr=True)
        self._stop = threading.Event()
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._bars: dict[str, TaskID] = {}
        self._share = 0.0
        self._began = time.monotonic()
        self._since = datetime.now(UTC).replace(microsecond=0)

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Show the display while the block runs."""
        with contextlib.suppress(StorageError):
            for name in self.names:  # what a killed run left behind
                self.pool.forget_progress(name)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as display:
            total = len(self.names) + self.found
            main = display.add_task(f"[bold]{self.noun}", total=total, completed=self.found, left="")
            thread = threading.Thread(target=self._watch, args=(display, main), daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._stop.set()
                thread.join()
                with contextlib.suppress(StorageError):
                    self._update(display, main)
                for bar in self._bars.values():
                    display.remove_task(bar)

    def _watch(self, display: Progress, main: TaskID) -> None:
        while not self._stop.wait(LOCAL if self.pool.local else REMOTE / 2):
            with contextlib.suppress(StorageError):  # the runs meet it too, and say so
                self._update(display, main)

    def _update(self, display: Progress, main: TaskID) -> None:
        partial = 0.0
        for name in self.names:
            if name in self._done:
                continue
            if name in self.pool:
                self._finish(display, name)
                continue
            if name in self._failed:
                continue
            # Two more requests a run are too many for a remote pool; its failures are told at the end.
            if self.pool.local and (failure := self.pool.failure(name)) and self._is_new(failure):
                self._fail(display, name, failure)
                continue
            state = self.pool.progress(name)
            if state and state["total"]:
                partial += state["step"] / state["total"]
                if name not in self._bars:
                    self._bars[name] = display.add_task(f"  {escape(self.labels[name])}", total=state["total"], left="")
                display.update(self._bars[name], completed=state["step"], total=state["total"])
        self._share = (len(self._done) + len(self._failed) + partial) / max(1, len(self.names))
        display.update(main, completed=self.found + len(self._done), left=self._left())

    def _left(self) -> str:
        """Say how long the rest takes, at the pace so far; however many runs go on at once is in that pace."""
        if not 0.02 < self._share < 1:
            return ""
        elapsed = time.monotonic() - self._began
        return f"about {_minutes(elapsed * (1 - self._share) / self._share)} left"

    def _is_new(self, failure: Failure) -> bool:
        return datetime.fromisoformat(failure.created) >= self._since

    def _fail(self, display: Progress, name: str, failure: Failure) -> None:
        self._failed.add(name)
        if name in self._bars:
            display.remove_task(self._bars.pop(name))
        why = failure.error.strip().splitlines()[0] if failure.error.strip() else "it left no reason"
        display.console.print(Text.assemble(("failed", "red"), f" {name[:8]}  {self.labels[name]}  {why}"))

    def _finish(self, display: Progress, name: str) -> None:
        self._done.add(name)
        self._failed.discard(name)
        if name in self._bars:
            display.remove_task(self._bars.pop(name))
        record = self.pool.ingredient(name)
        total = len(self.names) + self.found
        # Also in a log file, where no live display is drawn, each line tells how long the rest takes.
        self._share = max(self._share, (len(self._done) + len(self._failed)) / len(self.names))
        left = f"  {rest}" if (rest := self._left()) else ""
        display.console.print(
            Text(
                f"[{self.found + len(self._done)}/{total}] {record.short}  {self.describe(record)}  {self.labels[name]}  "
                f"{record.durations.get('total', 0):.0f} s{left}"
            )
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
