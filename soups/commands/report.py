"""`soups report FOLDER`: write the HTML page of a finished soup or protocol again, from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soups.commands.running import console, reported


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a soup or a protocol.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write. Default: FOLDER/report.html.")] = None,
) -> None:
    """Write the HTML report of a finished soup or protocol again, from its records."""
    with reported():
        from soups.reporting import read_page, remake, write_html

        if out is None:
            out = remake(folder)
        else:
            write_html(read_page(folder), out)
        console.print(str(out), soft_wrap=True, highlight=False, markup=False)
