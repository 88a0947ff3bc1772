"""The page of a finished soup, made from its report and the records of its ingredients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soups.errors import StorageError
from soups.reporting import soup_models, soup_parts
from soups.reporting.html import write_html
from soups.reporting.page import Page, Part
from soups.reporting.soup_report import SoupReport, soup_name
from soups.reporting.table import summary_sentence
from soups.stores.pool import Ingredient, Pool


def page_of(report: SoupReport, members: Sequence[Ingredient] = (), more: Sequence[Part] = ()) -> Page:
    """Return the page of a soup.

    Args:
        report: of the soup; parts that it has no data for are left out.
        members: records of the ingredients that were tried, for settings and training curves.
        more: further parts, shown after the curves.
    """
    parts: list[Part | None] = [
        soup_models.models(report),
        soup_parts.differences(report),
        soup_models.scatter(report),
        soup_parts.path(report),
        soup_parts.steps(report),
        soup_parts.shares(report),
        soup_parts.shares_by_tensor(report),
        soup_parts.optimism(report),
        soup_parts.diversity(report),
        *soup_parts.histories(report, members),
        *more,
        soup_parts.cost(report, members),
    ]
    return Page(
        title=f"{soup_name(report.recipe, first=True)} of {len(report.ingredients)} ingredients",
        subject="soup",
        summary=summary_sentence(report),
        warnings=report.warnings,
        parts=[part for part in parts if part is not None],
        configs={record.short: record.determinants or record.config for record in members},
        lineage={key: value for key, value in report.lineage.items() if key != "versions"},
        environment=report.versions | _layout(members),
    )


def save_page(page: Page, folder: Path) -> Path:
    """Write `page.json` and `report.html` into a folder; return the latter."""
    page.save(folder)
    path = folder / "report.html"
    write_html(page, path)
    return path


def read_page(folder: Path) -> Page:
    """Return the page of a finished folder: its `page.json`, or made from the `report.json` of an older soup.

    An older soup gets the settings and curves of its ingredients from its pool, as far as that is still there.

    Raises:
        StorageError: the folder holds neither, or it cannot be read.
    """
    if (folder / "page.json").is_file():
        return Page.load(folder)
    if not (folder / "report.json").is_file():
        raise StorageError(
            f"{folder} holds neither page.json nor report.json: name the folder of a soup or a protocol."
        )
    report = SoupReport.load(folder)
    return page_of(report, _records(report))


def remake(folder: Path) -> Path:
    """Write `report.html` again from what a folder holds; return its path. See `read_page`."""
    page, path = read_page(folder), folder / "report.html"
    write_html(page, path)
    return path


def _records(report: SoupReport) -> list[Ingredient]:
    if not report.pool:
        return []
    pool = Pool(report.pool)
    return [pool.ingredient(name) for name in report.ingredients if name in pool]


def _layout(members: Sequence[Ingredient]) -> dict[str, str]:
    """Return what the fits ran on; several values where they differ. Names of hosts stay out of pages that are passed on."""
    found: Mapping[str, list[Any]] = {
        key: sorted({str(record.layout[key]) for record in members if key in record.layout})
        for key in ("accelerator", "strategy", "world_size", "threads")
    }
    return {key: ", ".join(values) for key, values in found.items() if values}
