"""A run of the tracker for each finished soup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soups.fitting.run import Run
from soups.reporting import SoupReport, differences, flatten, plain_rows
from soups.soup_making.ingredients import from_elsewhere
from soups.stores.pool import Ingredient
from soups.tracking import group_name, log_soup, require_wandb


def track_soup(run: Run, report: SoupReport, folder: Path) -> None:
    """Log a finished soup with its tables, figures, page and lineage, if tracking is on."""
    layout = run.layout
    if not require_wandb(layout.tracking.mode):
        return
    tried: list[Ingredient] = []
    if not from_elsewhere(run):
        tried = [run.pool.ingredient(name) for name in report.ingredients if name in run.pool]
    soup, best = report.row(report.soup), report.row("best single")
    has_ood = len(report.splits) > 2
    summary = {f"{split}/accuracy": value for split, value in soup.accuracy.items()}
    summary |= {f"{split}/loss": value for split, value in soup.loss.items()}
    summary |= {f"gain/{split}": value - best.accuracy[split] for split, value in soup.accuracy.items()}
    summary |= {"ood/accuracy": soup.ood, "gain/ood": soup.ood - best.ood} if has_ood else {}
    summary |= {"members": len(report.members), "ingredients": len(report.ingredients)}
    summary |= {f"seconds/{phase}": value for phase, value in report.seconds.items()}
    for row in report.rows:
        if row.kind != "ingredient":
            summary |= {f"{row.name}/{split}": value for split, value in row.accuracy.items()}
            summary |= {f"{row.name}/ood": row.ood} if has_ood else {}
    log_soup(
        layout.tracking.shallow(),
        Path(layout.paths.output),
        f"{report.recipe}-soup-{report.fingerprint[:8]}",
        group_name(layout.tracking.group, str(layout.pool.path)),
        run.configuration.plain(),
        summary,
        {"results": plain_rows(report), "ingredients": _ingredients(tried, set(report.members))},
        [step.model_dump() for step in report.steps],
        {path.stem: path for path in sorted(folder.glob("*.png"))},
        report.lineage,
        folder / "soup.safetensors",
        page=folder / "report.html" if (folder / "report.html").is_file() else None,
        ingredients=[record.model_dump(mode="json") for record in tried if record.fingerprint in report.members],
    )


def _ingredients(tried: Sequence[Ingredient], chosen: set[str]) -> tuple[list[str], list[list[Any]]]:
    """Return a table of the ingredients: held-out numbers, whether they are in the soup, and the settings that differ."""
    keys, _ = differences({record.fingerprint: record.determinants for record in tried})
    rows: list[list[Any]] = []
    for record in tried:
        settings = flatten(record.determinants)
        numbers = record.metrics.get("heldout", {})
        values = [settings.get(key) for key in keys]
        plain = [value if isinstance(value, int | float | str | None) else str(value) for value in values]
        rows.append([record.short, record.fingerprint in chosen, numbers.get("accuracy"), numbers.get("loss"), *plain])
    return ["ingredient", "in the soup", "heldout_accuracy", "heldout_loss", *keys], rows
