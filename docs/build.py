"""Build the API reference from docstrings, and the catalogue of what the package offers: `make docs`.

Nothing is fetched. The result is a folder of HTML pages that opens from the disk.
"""

from __future__ import annotations

import html
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def summary(thing: Any) -> str:
    """Return the first sentence of a docstring."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return " ".join(text.split())


def signature(make: Callable[..., Any], leave_out: Iterable[str] = ()) -> str:
    """Return parameters with their defaults, as a call is written."""
    parameters = inspect.signature(make).parameters.values()
    return ", ".join(str(one).split(":")[0] + default(one) for one in parameters if one.name not in set(leave_out))


def default(parameter: inspect.Parameter) -> str:
    """Return a parameter's default as it is written in a call; nothing where it has none."""
    if parameter.default is inspect.Parameter.empty:
        return ""
    value: Any = parameter.default
    return f"={dict(value) if hasattr(value, 'items') else value!r}"


def catalogue() -> dict[str, list[tuple[str, str, str, str]]]:
    """Return, by section, rows of (name, what it is, parameters, where it is from or how it is chosen)."""
    from soups import callbacks
    from soups.merging import METHODS
    from soups.recipes import RECIPES
    from soups.recipes.recipe import GIVEN

    methods = [(name, entry.summary, signature(entry.make), entry.source) for name, entry in METHODS.items()]
    recipes = [(name, summary(one), signature(one, GIVEN), f"+soup={name}") for name, one in RECIPES.items()]
    classes = {name: one for name, one in vars(callbacks).items() if inspect.isclass(one) and one.__doc__}
    averages = [(name, summary(one), signature(one), "soups.callbacks") for name, one in sorted(classes.items())]
    protocols: list[tuple[str, str, str, str]] = []
    for path in sorted((ROOT / "conf" / "protocol").glob("*.yaml")):
        lines = path.read_text().splitlines()
        first = " ".join(line.lstrip("# ") for line in lines[:3] if line.startswith("#") and "@package" not in line)
        section: Any = yaml.safe_load(path.read_text()) or {}
        target = str((section.get("protocol") or {}).get("_target_", ""))
        protocols.append((path.stem, first, target, f"+protocol={path.stem}"))
    return {"Merge methods": methods, "Recipes": recipes, "Callbacks": averages, "Protocols": protocols}


def page(sections: dict[str, list[tuple[str, str, str, str]]]) -> str:
    """Return the catalogue as one HTML page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        "<title>soups: catalogue</title><style>body{font:16px/1.5 system-ui;margin:2rem auto;max-width:72rem;padding:0 1rem}",
        "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.4rem .6rem;",
        "border-bottom:1px solid #8884;overflow-wrap:anywhere}code{font-size:.9em}:root{color-scheme:light dark}</style>",
        "<h1>Catalogue</h1><p><a href=soups.html>API reference</a></p>",
    ]
    for title, rows in sections.items():
        parts.append(f"<h2 id={title.lower().replace(' ', '-')}>{title} ({len(rows)})</h2><table>")
        for name, text, parameters, source in rows:
            cells = [f"<code>{html.escape(name)}</code>", html.escape(text)]
            cells += [f"<code>{html.escape(parameters)}</code>", html.escape(source)]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append("</table>")
    return "\n".join(parts)


def build(out: Path) -> None:
    """Write the catalogue and the API reference."""
    import pdoc

    # Annotations that only type checkers import cannot be linked; they are shown as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    sections = catalogue()
    pdoc.render.configure(docformat="google", math=False, search=True)
    pdoc.pdoc("soups", output_directory=out)
    (out / "catalogue.html").write_text(page(sections))
    counts = ", ".join(f"{len(rows)} {title.lower()}" for title, rows in sections.items())
    print(f"{out}/index.html: API reference. {out}/catalogue.html: {counts}.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")
