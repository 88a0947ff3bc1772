"""The soup of somebody's program: chosen by its validation loop, shown by its test loop, recorded like our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soups.launch.own_program.configuration import Program
from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.members import choose_members
from soups.launch.own_program.options import recipe_options
from soups.launch.own_program.selection import ProgramSelection
from soups.reporting import SoupReport, draw_all, page_of, save_page, write_csv
from soups.stores import write_safetensors
from soups.stores.files import fingerprint, replacing_folder
from soups.stores.pool import Pool


def make_soup(
    program: Program,
    options: Mapping[str, Any],
    evaluation: Evaluation,
    asked: Sequence[str],
    output: Path,
    told: Sequence[str] = (),
) -> tuple[SoupReport, Path]:
    """Make the soup of a program's ingredients, or find it finished.

    Selection uses the validation loop alone; the test loop runs after it has ended.

    Args:
        program: with its start and metric.
        options: the `soup` section, checked.
        evaluation: of the program, which has validated once.
        asked: fingerprints of the ingredients that the command asked for.
        output: the folder that gets `soups/<recipe>-<fingerprint>/`.
        told: what to tell the user besides.

    Returns:
        The report, and the folder with `soup.safetensors`, `report.json`, `results.csv`, the figures and the page.

    Raises:
        ConfigError: an empty pool, or a metric that is not logged or does not repeat.
        WeightsError: ingredients that do not belong together.
    """
    assert evaluation.data is not None
    pool = Pool(program.pool)
    chosen = choose_members(
        program, pool, asked, evaluation.data, str(options.get("foreign", "refuse")),
        [str(name) for name in options.get("exclude", ())], bool(options.get("older", False)),
    )  # fmt: skip
    recipe = str(options["recipe"])
    name = fingerprint(
        {
            "recipe": {"recipe": recipe, **recipe_options(options)},
            "start": program.spec.start,
            "data": evaluation.data.digest,
            "metric": [program.monitor, program.mode],
            "ingredients": sorted(member.weights for member in chosen.members),
        }
    )
    folder = output / "soups" / f"{recipe}-{name[:8]}"
    if (folder / "report.json").is_file() and (folder / "soup.safetensors").is_file():
        return SoupReport.load(folder), folder
    report, weights = ProgramSelection(program, pool, chosen, evaluation).report(name, options, told)
    with replacing_folder(folder) as scratch:
        write_safetensors(scratch / "soup.safetensors", weights, {"lineage": json.dumps(report.lineage)})
        write_csv(report, scratch / "results.csv")
        draw_all(report, scratch)
        report.save(scratch)
        save_page(page_of(report, chosen.members), scratch)
    return report, folder
