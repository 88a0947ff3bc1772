"""`soups averages` and `soups export`: what averages a checkpoint holds, and one of them as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from soups.averaging import checkpoint

app = typer.Typer(help="Averages inside checkpoints.", no_args_is_help=True)


@app.command()
def averages(
    path: Annotated[Path, typer.Argument(help="A Lightning checkpoint, or the folder of a distributed one.")],
) -> None:
    """List the averages that a checkpoint holds."""
    table = Table("name", "kind", "points", "tensors")
    for row in checkpoint.averages(path):
        table.add_row(row.name, row.kind, str(row.count), str(row.tensors))
    Console().print(table)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A Lightning checkpoint, or the folder of a distributed one.")],
    to: Annotated[Path, typer.Option(help="The file to write: .safetensors, .pt or .ckpt.")],
    which: Annotated[str, typer.Option(help="Name of the average, or 'raw'.")] = "ema",
) -> None:
    """Write one average of a checkpoint to a file of its own."""
    written = checkpoint.export(path, which, to)
    Console().print(f"Wrote {which!r} of {path} to {written}.", soft_wrap=True)
