"""What a command shows at its end: the closing table, warnings, and how to load the soup. Texts are never read as markup."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from soups.reporting import Report, summary_sentence, tables


def show(report: Report, folder: Path, console: Console, strict: bool) -> None:
    """Print the closing table and where the soup is.

    Args:
        report: of the soup.
        folder: that holds it.
        console: to print on.
        strict: the soup's file has all the state of the module.
    """
    console.print()
    for table in tables(report, console.width):
        console.print(table)
    console.print(Text(summary_sentence(report)))
    for warning in report.warnings:
        console.print(Text.assemble(("! ", "yellow"), warning))
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(Text.assemble("\n", (f"{folder}/", "bold"), f"  {names}"), soft_wrap=True)
    how = "" if strict else ", strict=False"
    console.print(
        Text(f"Load it: module.load_state_dict(safetensors.torch.load_file('{folder}/soup.safetensors'){how})"),
        soft_wrap=True,
    )
