"""`soups diff A B`: where and how much two checkpoints differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from soups.commands.inspect import layer_of
from soups.commands.running import console, reported


def diff(
    first: Annotated[str, typer.Argument(help="A checkpoint.")],
    second: Annotated[str, typer.Argument(help="Another checkpoint.")],
    by_tensor: Annotated[
        bool, typer.Option("--tensors", help="Compare tensor by tensor instead of layer by layer.")
    ] = False,
    top: Annotated[int, typer.Option(help="Show only the rows with the largest differences; 0 shows all.")] = 20,
    figure: Annotated[Path | None, typer.Option(help="Save a heatmap of relative differences to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where and how much two checkpoints differ: relative norm, cosine, largest element."""
    with reported():
        from soups.merging.compare import compare, gather

        differences, mismatch = compare(first, second)
        rows = differences if by_tensor else gather(differences, layer_of)
        if figure is not None:
            from soups.merging.compare import heatmap

            heatmap(differences, figure)
        if as_json:
            content: dict[str, Any] = {name: row._asdict() for name, row in rows.items()}
            typer.echo(json.dumps({"mismatch": mismatch, "rows": content}, indent=2))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table("tensor" if by_tensor else "layer", "|a − b| / |a|", "cosine", "largest", box=None)
        ordered = sorted(rows.items(), key=lambda item: -item[1].relative)
        changed = [(name, row) for name, row in ordered if row.distance > 0 or math.isnan(row.distance)]
        for name, row in changed[: top or None]:
            table.add_row(Text(name), f"{row.relative:.3e}", f"{row.cosine:.6f}", f"{row.largest:.3e}")
        if changed:
            console.print(table)
        if mismatch:
            console.print(f"not comparable: {mismatch}", soft_wrap=True, markup=False)
        same = len(rows) - len(changed)
        what = "tensors" if by_tensor else "layers"
        console.print(f"{len(changed)} {what} differ, {same} are equal")
        if changed or mismatch:
            raise typer.Exit(1)
