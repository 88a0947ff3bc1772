"""`soups inspect PATH`: the contents of a checkpoint, read from its headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from soups.commands.running import console, readable, reported


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint: file, folder or URL.")],
    state: Annotated[
        str | None, typer.Option(help="The weights to show: average, average:NAME, raw, or a path inside the file.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a checkpoint's contents: weights by layer, dtypes, ties, averages, metadata."""
    with reported():
        from soups.stores import TorchStore, open_store

        with open_store(path, state=state, as_stored=True) as store:
            tied = store.tied()
            rows: dict[str, dict[str, Any]] = {}
            total = {"tensors": 0, "parameters": 0, "bytes": 0}
            dtypes: dict[str, int] = {}
            for key in store:
                if key in tied or key in store.unreadable:
                    continue
                meta = store.meta(key)
                name = str(meta.dtype).removeprefix("torch.")
                dtypes[name] = dtypes.get(name, 0) + 1
                row = rows.setdefault(key if tensors else layer_of(key), {"tensors": 0, "parameters": 0, "bytes": 0})
                row["shape"] = list(meta.shape) if tensors else None
                row["dtype"] = name
                for counted in (row, total):
                    counted["tensors"] += 1
                    counted["parameters"] += meta.numel
                    counted["bytes"] += meta.nbytes
            states = store.states if isinstance(store, TorchStore) else []
            skipped = store.skipped if isinstance(store, TorchStore) else {}
            report = {
                **total, "dtypes": dtypes, "tied": tied, "states": states, "metadata": dict(store.metadata),
                "unreadable": dict(store.unreadable), "skipped": skipped,
            }  # fmt: skip
        if as_json:
            typer.echo(json.dumps({"path": path, **report, "rows": rows}, indent=2))
            return
        _print(path, rows, report, tensors=tensors)


def _print(path: str, rows: dict[str, dict[str, Any]], report: dict[str, Any], *, tensors: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("tensor" if tensors else "layer", "shape" if tensors else "tensors", "parameters", "size", box=None)
    for name, row in rows.items():
        shape = f"{row['dtype']} {row['shape']}" if tensors else str(row["tensors"])
        table.add_row(Text(name), Text(shape), f"{row['parameters']:,}", readable(row["bytes"]))
    console.print(table)
    kinds = ", ".join(f"{count} {name}" for name, count in report["dtypes"].items())
    console.print(
        f"{Path(path).name}: {report['parameters']:,} parameters in {report['tensors']} tensors ({kinds}), "
        f"{readable(report['bytes'])}",
        markup=False,
    )
    for name, first in report["tied"].items():
        console.print(f"tied: {name} = {first}", soft_wrap=True, markup=False)
    if report["states"]:
        names = ", ".join(name or "(the whole file)" for name in report["states"])
        console.print(f"sets of weights: {names}", soft_wrap=True, markup=False)
    for name, kind in report["unreadable"].items():
        console.print(f"cannot be read: {name}, {kind}", soft_wrap=True, markup=False)
    for name, kind in list(report["skipped"].items())[:10]:
        console.print(f"not loaded: {name or 'the whole file'} ({kind})", soft_wrap=True, markup=False)
    if len(report["skipped"]) > 10:
        console.print(f"not loaded: {len(report['skipped']) - 10} more objects")
    for name, text in report["metadata"].items():
        console.print(f"{name}: {text[:200]}", markup=False, soft_wrap=True)


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to: its name up to the first number, or up to the last dot.

    >>> layer_of("model.layers.3.mlp.up.weight"), layer_of("lm_head.weight"), layer_of("scale")
    ('model.layers.3', 'lm_head', 'scale')
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1]) or name
