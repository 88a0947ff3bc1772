"""`soups methods`: every merge method, what it needs, and where it is from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from soups.commands.running import console, reported


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List merge methods: their parameters, whether they need a base model, their paper."""
    with reported():
        import inspect

        from soups.errors import ConfigError, did_you_mean
        from soups.merging import METHODS

        if name is not None and name not in METHODS:
            raise ConfigError(f"There is no merge method {name!r}; {did_you_mean(name, METHODS)}")
        chosen = METHODS if name is None else {name: METHODS[name]}
        if as_json:
            rows = {
                key: {
                    "summary": entry.summary,
                    "source": entry.source,
                    "base": entry.make().base,
                    "parameters": entry.parameters,
                }
                for key, entry in chosen.items()
            }
            typer.echo(json.dumps(rows, indent=2))
            return
        if name is not None:
            entry = METHODS[name]
            console.print(f"{name} ({entry.source})\n\n{inspect.getdoc(entry.make)}", markup=False)
            return
        from rich.table import Table

        table = Table("method", "base", "parameters", "from", box=None)
        for key, entry in chosen.items():
            parameters = ", ".join(f"{parameter}={default}" for parameter, default in entry.parameters.items())
            table.add_row(key, entry.make().base, parameters, entry.source)
        console.print(table)
