"""The page of a finished merge: what went in, and how far the result is from each input, by layer."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import soups
from soups.errors import WeightsError
from soups.evaluation import distances
from soups.merging.compare import TensorDifference, compare, gather
from soups.merging.mergekit.schema import Document, MergeConfiguration, ModelReference, read_configuration
from soups.merging.mergekit.sections import references
from soups.reporting.page import Cell, Curves, Page, Part, Table
from soups.reporting.pairs import distance_heatmaps
from soups.stores import open_store


def merge_page(
    config: str | Path,
    out: str | os.PathLike[str],
    layer_of: Callable[[str], str],
    *,
    seed: int = 0,
    seconds: float | None = None,
    warnings: Sequence[str] = (),
) -> Page:
    """Return the page of a merge that a configuration in mergekit's format described.

    Inputs and result are read again, tensor by tensor, in little memory. Inputs with adapters or revisions, or that an
    earlier document of the file made, are named but not compared.

    Args:
        config: the configuration that was carried out.
        out: its result.
        layer_of: gives the layer that a tensor belongs to.
        seed: of random masks.
        seconds: that the merge took.
        warnings: that it gave.
    """
    configuration = read_configuration(config)
    document = configuration.documents[-1]
    inputs = references(document)
    made = {one.name for one in configuration.documents if one.name}
    plain = [one for one in inputs if not (one.lora or one.revision or one.path in made)]
    found: dict[ModelReference, dict[str, TensorDifference]] = {}
    notes = list(warnings)
    for one in plain:
        found[one], mismatch = compare(one.path, os.fspath(out))
        if mismatch:
            notes.append(f"{one} and the result are compared where they fit: {mismatch}")
    skipped = [str(one) for one in inputs if one not in plain]
    if skipped:
        notes.append(f"Not compared with the result: {', '.join(skipped)}.")
    names = dict(zip(found, _short([str(one) for one in found]), strict=True))
    base = document.base_model
    parts: list[Part] = [_inputs(document, inputs, found, layer_of)]
    if found:
        parts += _layers({names[one]: gather(rows, layer_of) for one, rows in found.items()})
    experts = [one for one in found if one != base]
    if base in found and experts:
        try:
            with ExitStack() as stack:
                places = [base.path, *(one.path for one in experts), os.fspath(out)]
                gaps = distances([stack.enter_context(open_store(place)) for place in places])
        except WeightsError as error:
            notes.append(f"No distances between the models: {error}")
        else:
            labels = [*(names[one] for one in experts), "merged"]
            heatmaps = distance_heatmaps(labels, gaps)
            for part, start in zip(heatmaps, (True, False), strict=True):
                part.title = "Distance between weights" if start else "Direction of the task vectors"
                part.note = (
                    "Euclidean norm of the difference; start is the base model."
                    if start
                    else "Cosine between what was added to the base: 1 the same way, 0 unrelated."
                )
            parts += heatmaps
    if seconds is not None:
        parts.append(Table(title="Cost", columns=["phase", "time, s"], rows=[["merge", seconds]]))
    count = len([one for one in inputs if one != base])
    to = f" onto {base}" if base else ""
    total = sum(row.distance**2 for row in found[base].values()) ** 0.5 if base in found else None
    moved = f" The result is at distance {total:.4g} from the base." if total is not None else ""
    return Page(
        title=f"{document.merge_method} merge of {count} models",
        subject="merge",
        summary=f"{document.merge_method} of {count} model{'' if count == 1 else 's'}{to}.{moved}",
        warnings=notes,
        parts=parts,
        lineage=_lineage(configuration, inputs, out, seed),
        environment={
            "soups": soups.__version__, "torch": torch.__version__, "python": platform.python_version(),
        },
    )  # fmt: skip


def _short(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths, as many as tell them apart.

    >>> _short(["a/x/model", "a/y/model"])
    ['x/model', 'y/model']
    """
    pieces = [Path(path).parts for path in paths]
    for length in range(1, max((len(parts) for parts in pieces), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in pieces]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _inputs(
    document: Document,
    inputs: Sequence[ModelReference],
    found: dict[ModelReference, dict[str, TensorDifference]],
    layer_of: Callable[[str], str],
) -> Table:
    own = {one.model: one.parameters for one in document.models or []}
    rows: list[list[Cell | float | int | str | None]] = []
    for one in inputs:
        whole = gather(found[one], lambda _: "") if one in found else {}
        row = whole.get("")
        role = "base" if one == document.base_model else "model"
        rows.append([
            str(one), role, _parameters(own.get(one)), row.relative if row else None, row.cosine if row else None,
            sum(difference.distance == 0 for difference in found[one].values()) if one in found else None,
        ])  # fmt: skip
    shared = _parameters(document.parameters)
    return Table(
        title="Inputs",
        note="Relative distance is |merged − input| over |input|, over all weights."
        + (f" Parameters of the whole merge: {shared}." if shared else ""),
        columns=["input", "role", "parameters", "relative distance", "cosine", "equal tensors"],
        rows=rows,
    )


def _parameters(value: Any) -> str:
    """Write parameters in a line; None where there are none."""
    if value is None:
        return ""
    content: dict[str, Any] = (
        value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value
    )
    return ", ".join(f"{key}={item}" for key, item in content.items())


def _layers(by_input: dict[str, dict[str, TensorDifference]]) -> list[Part]:
    layers = list(dict.fromkeys(layer for rows in by_input.values() for layer in rows))
    columns = ["layer", *(f"distance from {name}" for name in by_input), *(f"cosine with {name}" for name in by_input)]
    rows: list[list[Cell | float | int | str | None]] = []
    for layer in layers:
        ours = [by_layer.get(layer) for by_layer in by_input.values()]
        rows.append([layer, *(row and row.relative for row in ours), *(row and row.cosine for row in ours)])
    table = Table(title="By layer", note="Distances are relative to the input's norm.", columns=columns, rows=rows)
    if len(layers) < 2:
        return [table]
    curves = Curves(
        title="Distance from the inputs, by layer",
        note="|merged − input| over |input|, layers in their order in the file.",
        x_label="layer",
        y_label="relative distance",
        x=[float(number) for number in range(1, len(layers) + 1)],
        series={name: [row.get(layer) and row[layer].relative for layer in layers] for name, row in by_input.items()},
    )
    return [curves, table]


def _lineage(
    configuration: MergeConfiguration, inputs: Sequence[ModelReference], out: str | os.PathLike[str], seed: int
) -> dict[str, Any]:
    return {
        "inputs": [str(one) for one in inputs],
        "output": os.fspath(out),
        "seed": seed,
        "configuration": configuration.text,
    }
