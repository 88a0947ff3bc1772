"""What a command shows at its end. Names, paths and errors are shown as they are: none of them is ever read as markup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from soups.reporting import SoupReport, summary_sentence, tables


def show_report(report: SoupReport, folder: Path, how_to_load: str, console: Console) -> None:
    """Print the closing table of a soup, its warnings, and where it is.

    Args:
        report: of the soup.
        folder: that holds it.
        how_to_load: a line of code.
        console: to print on.
    """
    console.print()
    for table in tables(report, console.width):
        console.print(table)
    show_end(summary_sentence(report), report.warnings, folder, console)
    console.print(Text(f"Load it: {how_to_load}"), soft_wrap=True)


def show_end(summary: str, warnings: Sequence[str], folder: Path, console: Console) -> None:
    """Print a sentence with the finding, warnings, and the files of a folder."""
    console.print(Text(summary))
    for warning in warnings:
        console.print(Text.assemble(("! ", "yellow"), warning))
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(Text.assemble("\n", (f"{folder}/", "bold"), f"  {names}"), soft_wrap=True)
