"""A page as one HTML file: styles, script and data inside, nothing from the network, readable without the script.

Tables, warnings, settings and lineage are plain HTML. Figures are drawn by a small script from embedded JSON; each has its
values as a table beneath. Everything that comes from the page is escaped, and a content security policy that names the
script by its hash lets nothing else run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from soups.reporting.differences import differences, flatten
from soups.reporting.page import Cell, Curves, Matrix, Page, Scatter, Steps, Table, p_value_text
from soups.stores.files import write_text

_SUBJECTS = {"soup": "Soup", "protocol": "Protocol", "merge": "Merge"}


def render(page: Page) -> str:
    """Return the page as one HTML file. The same page gives the same bytes."""
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    for number, part in enumerate(page.parts):
        figure = not isinstance(part, Table)
        values = _values(part)
        parts.append({
            "id": f"part-{number}", "title": part.title, "note": part.note, "kind": part.kind, "figure": figure,
            "wide": isinstance(part, Matrix) and len(part.column_labels) > 12,
            "table": _view(values),
        })  # fmt: skip
        if figure:
            figures.append({"id": f"part-{number}", **part.model_dump()})
    differing, shared = differences(page.configs)
    settings = _view(_settings(page.configs, differing), exact=True) if page.configs and differing else None
    return _template().render(
        page=page,
        subject=_SUBJECTS[page.subject],
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=style,
        script=script,
        data=embeddable({"figures": figures}),
        parts=parts,
        settings=settings,
        shared=[(key, _text(value)) for key, value in shared.items()],
        lineage_json=json.dumps(_finite(page.lineage), indent=2, ensure_ascii=False),
    )


def write_html(page: Page, path: Path) -> None:
    """Write the page to a file, atomically.

    Raises:
        StorageError: the place cannot be written.
    """
    write_text(path, render(page))


def embeddable(value: Any) -> str:
    """Return JSON that can stand inside a script element: no text of it ends the element or starts a comment.

    >>> embeddable({"name": "</script>"})
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(_finite(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _settings(configs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> Table:
    flat = {name: flatten(config) for name, config in configs.items()}

    def value(config: Mapping[str, Any], key: str) -> float | int | str | None:
        found = config.get(key)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None if key not in config else _text(found)
        return found

    return Table(
        title="Settings that differ",
        columns=["", *keys],
        rows=[[name, *(value(config, key) for key in keys)] for name, config in flat.items()],
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _values(part: Table | Curves | Matrix | Scatter | Steps) -> Table:
    """Return what a figure shows as a table; a table as it is."""
    if isinstance(part, Table):
        return part
    if isinstance(part, Curves):
        rows: list[list[Cell | float | int | str | None]] = []
        for number, x in enumerate(part.x):
            row: list[Cell | float | int | str | None] = [x]
            for name, values in part.series.items():
                value = values[number]
                bounds = (_at(part.low, name, number), _at(part.high, name, number))
                row.append(None if value is None else Cell(value=value, low=bounds[0], high=bounds[1]))
            rows.append(row)
        return Table(title=part.title, columns=[part.x_label, *part.series], rows=rows)
    if isinstance(part, Matrix):
        return Table(
            title=part.title,
            columns=["", *part.column_labels],
            rows=[[label, *values] for label, values in zip(part.row_labels, part.values, strict=True)],
        )
    if isinstance(part, Scatter):
        return Table(
            title=part.title,
            columns=["group", "name", part.x_label, part.y_label],
            rows=[[group, point.name, point.x, point.y] for group, points in part.groups.items() for point in points],
        )
    columns = ["step", "candidate", part.score_label, "to reach", "decision"]
    together = zip(part.names, part.scores, part.to_reach, part.kept, strict=True)
    return Table(
        title=part.title,
        columns=columns,
        rows=[
            [number, name, score, reach, "kept" if kept else "left out"]
            for number, (name, score, reach, kept) in enumerate(together, start=1)
        ],
    )


def _at(bounds: Mapping[str, Sequence[float | None]], name: str, number: int) -> float | None:
    return bounds[name][number] if name in bounds else None


def _view(table: Table, exact: bool = False) -> dict[str, Any]:
    """Return a table as the template writes it: texts, the value to sort by, and the interval.

    With `exact`, numbers are written as they are, each by itself: settings, which are not measured.
    """
    columns: list[dict[str, Any]] = []
    written: list[list[dict[str, Any]]] = [[] for _ in table.rows]
    for number, heading in enumerate(table.columns):
        cells = [row[number] if number < len(row) else None for row in table.rows]
        numbers = [value for cell in cells if (value := _number(cell)) is not None]
        numeric = bool(numbers) and not any(isinstance(cell, str) for cell in cells)
        name, _, unit = heading.rpartition(", ") if ", " in heading else (heading, "", "")
        decimals = None if exact else _decimals(numbers, unit, all(isinstance(cell, int | None) for cell in cells))
        columns.append({"name": name, "unit": unit, "numeric": numeric})
        for row, cell in zip(written, cells, strict=True):
            row.append(_cell(cell, decimals, numeric))
            if exact and isinstance(cell, int):
                row[-1]["text"] = str(cell)
            if heading == "p" and isinstance(cell, float) and math.isfinite(cell):
                row[-1]["text"] = p_value_text(cell)
    rows = [{"cells": cells, "highlight": number in table.highlight} for number, cells in enumerate(written)]
    return {"title": table.title, "columns": columns, "rows": rows}


def _number(cell: Cell | float | int | str | None) -> float | None:
    value = cell.value if isinstance(cell, Cell) else cell
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)


def _cell(cell: Cell | float | int | str | None, decimals: int | None, numeric: bool) -> dict[str, Any]:
    if isinstance(cell, str):
        return {"text": cell, "sort": cell, "interval": "", "mono": bool(_HASH.fullmatch(cell))}
    value = _number(cell)
    if value is None:
        return {"text": "–", "sort": "", "interval": "", "mono": False}
    interval = ""
    if isinstance(cell, Cell) and cell.low is not None and cell.high is not None:
        fewer = decimals and decimals - 1  # the value's last digit means nothing for its bounds
        low, high = _write(cell.low, fewer), _write(cell.high, fewer)
        interval = f"{low} to {high}" if min(cell.low, cell.high) < 0 else f"{low}\N{EN DASH}{high}"
    return {
        "text": _write(value, decimals if numeric else None), "sort": repr(value), "interval": interval, "mono": False
    }  # fmt: skip


_HASH = re.compile(r"[0-9a-f]{8}|[0-9a-f]{12}|[0-9a-f]{16}|[0-9a-f]{40}|[0-9a-f]{64}")


def _decimals(values: Sequence[float], unit: str, whole: bool) -> int | None:
    """Return how many decimals a column is written with; None: four significant digits for each value by itself."""
    if whole:
        return 0
    if unit == "%":
        return 2
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) >= 1e6 or min(sizes) < 1e-3 or max(sizes) / min(sizes) > 1e4:
        return None
    return max(0, 3 - math.floor(math.log10(max(sizes))))


def _write(value: float, decimals: int | None) -> str:
    if not math.isfinite(value):
        return "–"
    text = f"{value:.4g}" if decimals is None else f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}").replace(",", "\N{NARROW NO-BREAK SPACE}")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has no words for, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in cast(Sequence[Any], value)]
    return value


@cache
def _asset(name: str) -> str:
    return (files("soups.reporting") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = _short
    environment.tests["record"] = lambda value: isinstance(value, Mapping)
    environment.tests["records"] = _is_records
    environment.tests["listing"] = lambda value: isinstance(value, list)
    environment.filters["plain"] = _text
    return environment.from_string(_asset("page.html"))


def _short(text: str) -> str:
    """Return a long hash by its first twelve characters."""
    return text[:12] if len(text) >= 32 and _HASH.fullmatch(text) else text


def _is_records(value: Any) -> bool:
    """Tell whether a value is a list of flat records with the same keys, which reads best as a table."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    items = [cast(Mapping[str, Any], item) for item in cast(list[Any], value) if isinstance(item, Mapping)]
    if len(items) < len(cast(list[Any], value)) or any(set(item) != set(items[0]) for item in items):
        return False
    return not any(isinstance(inner, (Mapping, list)) for item in items for inner in item.values())
