"""`soups methods` lists the merge methods; `soups methods NAME` shows the card of one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from soups.commands.running import console, reported

if TYPE_CHECKING:
    from soups.merging.cards import Card


def methods(
    name: Annotated[
        str | None, typer.Argument(help="The method to describe, with a configuration to start from.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merge methods, or describe one.

    A description gives the method's idea, its failure cases, its parameters with their defaults, and a configuration for
    `soups merge`. Fill in the paths to run it.
    """
    with reported():
        from soups.errors import ConfigError, did_you_mean
        from soups.merging import METHODS
        from soups.merging.cards import card
        from soups.merging.mergekit.methods import skeleton

        if name is not None and name not in METHODS:
            raise ConfigError(f"There is no merge method {name!r}; {did_you_mean(name, METHODS)}")
        chosen = METHODS if name is None else {name: METHODS[name]}
        cards = {key: card(key, entry.make, entry.source) for key, entry in chosen.items()}
        if as_json:
            rows = {
                key: {
                    **asdict(found),
                    "parameters": {one.name: one.default for one in found.parameters},
                    "configuration": skeleton(key),
                }
                for key, found in cards.items()
            }
            typer.echo(json.dumps(rows, indent=2))
            return
        if name is not None:
            console.print(_page(cards[name], skeleton(name)), markup=False, highlight=False, soft_wrap=True)
            return
        from rich.table import Table

        table = Table("method", "base model", "parameters", "from", box=None)
        for key, found in cards.items():
            parameters = ", ".join(f"{one.name}={one.default}" for one in found.parameters)
            table.add_row(key, found.base, parameters, found.source)
        console.print(table)


def _page(card: Card, configuration: str) -> str:
    needs = [f"base model: {card.base}", f"models: {card.models}"]
    if card.statistics:
        needs.append(f"statistics: {', '.join(card.statistics)}")
    lines = [
        f"{card.name} ({card.source})",
        "",
        card.idea,
        "",
        f"When it fails: {card.fails}",
        "",
        "; ".join(needs),
        "",
    ]
    if card.parameters:
        lines.append("Parameters")
        width = max(len(one.name) for one in card.parameters)
        for one in card.parameters:
            each = "; one for all models, or one for each" if one.per_model and "one for" not in one.text else ""
            lines.append(f"  {one.name:<{width}}  {one.text.rstrip('.')}{each} (default: {one.default})")
        lines.append("")
    return "\n".join(
        [*lines, "Configuration for soups merge", "", *(f"  {line}" for line in configuration.splitlines())]
    )
