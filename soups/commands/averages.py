"""`soups averages` lists the averages in a checkpoint; `soups export` writes one of them to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from soups.averaging import checkpoint
from soups.commands.running import console, reported
from soups.errors import StorageError

app = typer.Typer(help="Averages inside checkpoints.", no_args_is_help=True)
_CHECKPOINT = "A checkpoint file of Lightning or another program, or the folder of a distributed checkpoint."


@app.command()
def averages(path: Annotated[Path, typer.Argument(help=_CHECKPOINT)]) -> None:
    """List the averages in a training checkpoint."""
    with reported():
        table = Table("name", "kind", "points", "tensors")
        for row in checkpoint.averages(path):
            table.add_row(Text(row.name), Text(row.kind), str(row.count), str(row.tensors))
        console.print(table)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help=_CHECKPOINT)],
    to: Annotated[Path, typer.Option(help="The file to write: .safetensors, .pt or .ckpt.")],
    which: Annotated[str, typer.Option(help="The average's name, or 'raw' for the training weights.")] = "ema",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write one average of a training checkpoint to a file."""
    with reported():
        if to.exists() and not overwrite:
            raise StorageError(
                f"There is something at {to} already. Choose another file, or allow overwriting (--overwrite)."
            )
        written = checkpoint.export(path, which, to)
        console.print(f"Wrote {which!r} of {path} to {written}.", soft_wrap=True, markup=False, highlight=False)
