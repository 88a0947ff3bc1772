"""`soups dashboard PROJECT`: create W&B panels for sweeps and soups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from soups.commands.running import console, reported


def dashboard(
    project: Annotated[str, typer.Argument(help="The W&B project.")],
    entity: Annotated[str | None, typer.Option(help="The W&B team or user. Default: your own.")] = None,
    name: Annotated[str, typer.Option(help="The workspace's name.")] = "Soups",
    with_report: Annotated[bool, typer.Option("--report", help="Also create a draft of a W&B report.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the workspace as JSON; send nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --dry-run: write the JSON here.")] = None,
) -> None:
    """Save a shared W&B workspace with panels for soups, ingredients and cost."""
    with reported():
        from soups.errors import ConfigError
        from soups.stores.files import write_json
        from soups.tracking.workspace import as_json, report, workspace

        if out is not None and not dry_run:
            raise ConfigError("--out is for --dry-run: without it the workspace goes to W&B.")
        if dry_run:
            content = as_json(workspace(project, entity or "", name))
            if out is None:
                typer.echo(json.dumps(content, indent=2))
            else:
                write_json(out, content)
                console.print(f"Wrote {out}.", markup=False, soft_wrap=True)
            return
        import wandb
        from wandb.errors import CommError, UsageError

        try:
            entity = entity or str(wandb.Api().default_entity or "")
            if not entity:
                raise ConfigError("W&B knows no default entity of yours: name one with --entity.")
            made = [workspace(project, entity, name), *([report(project, entity, name)] if with_report else [])]
            for item in made:
                console.print(str(item.save().url), markup=False, soft_wrap=True)
        except (UsageError, CommError) as error:
            raise ConfigError(
                f"W&B did not take it: {error}. Log in (`wandb login`), or look at it with --dry-run."
            ) from error
