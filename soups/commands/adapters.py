"""`soups extract-lora` makes a LoRA adapter from a fine-tuned model; `soups merge-lora` merges several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soups.commands.running import console, quick_imports, reported


def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Annotated[str, typer.Argument(help="The base model of the fine-tune.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[int | None, typer.Option(help="The largest rank of a module's factors.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of squared singular values to keep in each module: 0.99.")
    ] = None,
    save_heads: Annotated[bool, typer.Option(help="Save embeddings and output heads in full.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at OUT.")] = False,
) -> None:
    """Approximate the changes of a full fine-tune by a LoRA adapter that PEFT loads."""
    with reported():
        with quick_imports():
            from soups.artifacts.adapters import extract_adapter

        made = extract_adapter(model, base, out, rank=rank, energy=energy, save_heads=save_heads, overwrite=overwrite)
        ranks = sorted(made.ranks.values())
        kept = (
            f"; ranks {ranks[0]} to {ranks[-1]}, at least {min(made.kept.values()):.1%} of a change kept"
            if ranks
            else ""
        )
        console.print(
            f"{made.path}: {len(ranks)} modules{kept}; {len(made.saved)} saved in full", soft_wrap=True, markup=False
        )


def merge_lora(
    adapters: Annotated[list[Path], typer.Argument(help="The adapters' folders.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    method: Annotated[str, typer.Option(help="cat, svd, linear, ties, dare_linear, …; see the README.")] = "svd",
    weight: Annotated[
        list[float] | None, typer.Option(help="The weight of an adapter; repeat it for each one. Default: 1/N.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The result's rank, for svd, knots and *_svd.")] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of elements to keep, for ties, dare and prune.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of DARE's masks.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at OUT.")] = False,
) -> None:
    """Merge LoRA adapters of one base model into one adapter that PEFT loads."""
    with reported():
        with quick_imports():
            from soups.artifacts.adapters import merge_adapters

        path = merge_adapters(
            adapters, out=out, method=method, weights=weight or None, rank=rank, density=density, seed=seed,
            overwrite=overwrite,
        )  # fmt: skip
        console.print(f"{path}: {len(adapters)} adapters merged by {method}", soft_wrap=True, markup=False)
