"""The command `soups`. Sub-commands are in `soups.commands`; none of them imports torch before it runs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated

import typer

from soups import __version__
from soups.commands import cold
from soups.commands.adapters import extract_lora, merge_lora
from soups.commands.dashboard import dashboard
from soups.commands.diff import diff
from soups.commands.inspect import inspect
from soups.commands.merge import merge
from soups.commands.methods import methods
from soups.commands.pool import app as pool
from soups.commands.report import report
from soups.commands.stats import app as stats

app = typer.Typer(
    name="soups",
    help="Weight averaging: merge, inspect and compare checkpoints, pools and averages.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (merge, inspect, diff, methods, report, dashboard):
    app.command()(command)
for name, command in (("extract-lora", extract_lora), ("merge-lora", merge_lora)):
    app.command(name)(command)
app.add_typer(pool, name="pool")
app.add_typer(cold.app, name="cold")
app.add_typer(stats, name="stats")


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
    """Weight averaging: merge, inspect and compare checkpoints, pools and averages."""


def _forward(command: str, summary: str) -> None:
    """Add a command of `soups.commands.averages`, which is imported (with torch) when the command runs, not for `--help`."""

    def run(context: typer.Context) -> None:
        module = importlib.import_module("soups.commands.averages")
        module.app(args=[command, *context.args], prog_name="soups")

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": list[str]()}
    app.command(command, help=summary, context_settings=settings)(run)


if importlib.util.find_spec("soups.commands.averages"):
    _forward("averages", "List the averages in a training checkpoint.")
    _forward("export", "Write one average of a training checkpoint to a file.")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
