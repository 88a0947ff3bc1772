"""The command `soups`. Sub-commands are in `soups.commands`; none of them imports torch before it runs."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from soups import __version__
from soups.commands.diff import diff
from soups.commands.inspect import inspect
from soups.commands.merge import merge
from soups.commands.methods import methods

app = typer.Typer(
    name="soups",
    help="Weight averaging: merge checkpoints, look into them, compare them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (merge, inspect, diff, methods):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"soups {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Weight averaging: merge checkpoints, look into them, compare them."""


# Commands on averages inside training checkpoints live beside the callbacks that write them.
try:
    app.add_typer(importlib.import_module("soups.commands.averages").app, name="averages")
except ModuleNotFoundError as error:
    if error.name != "soups.commands.averages":
        raise


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
