"""Helpers of all commands: errors without a traceback, and a progress line."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager

import typer
from rich.console import Console

from soups.errors import SoupError

console = Console()
errors = Console(stderr=True)


@contextmanager
def reported() -> Generator[None]:
    """Print a `SoupError` (or an interruption) as one paragraph and end with status 1 (or 130)."""
    try:
        yield
    except SoupError as error:
        errors.print(f"[bold red]Error:[/] {_escaped(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except BrokenPipeError:  # whoever reads our output has seen enough
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        errors.print(
            f"[bold red]Error:[/] {_escaped(where)}{_escaped(error.strerror or str(error))}. Check the path, its permissions "
            f"and the disk.",
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        errors.print(
            "Interrupted; there is no output. The same command goes on from finished shards, if there were several."
        )
        raise typer.Exit(130) from error


@contextmanager
def quick_imports() -> Generator[None]:
    """Import without garbage collection, and exempt the imported objects from it: saves a tenth of torch's import time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def warn(message: str) -> None:
    """Print a warning."""
    errors.print(f"[bold yellow]Warning:[/] {_escaped(message)}", soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def progress_bar(total: int, *, quiet: bool) -> Generator[Callable[[int], None]]:
    """Show bytes, bytes a second and the time left; yield what to call with each number of bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=quiet, transient=True) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)


def parse_size(text: str) -> int:
    """Return bytes from a number with an optional decimal suffix.

    >>> parse_size("5B"), parse_size("500M"), parse_size("1024")
    (5000000000, 500000000, 1024)

    Raises:
        ConfigError: it is no size.
    """
    from soups.errors import ConfigError

    factors = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
    stripped = text.strip().upper()
    factor = factors.get(stripped[-1:], 1)
    try:
        size = int(float(stripped[:-1] if factor > 1 else stripped) * factor)
    except ValueError:
        size = 0
    if size <= 0:
        raise ConfigError(
            f"{text!r} is no size. Write bytes with an optional K, M, G (or B, as mergekit has it) or T: 5G."
        )
    return size


def readable(count: float) -> str:
    """Return a number of bytes as text with a unit.

    >>> readable(1_500_000_000), readable(999)
    ('1.5 GB', '999 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
