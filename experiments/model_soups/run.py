"""Repeat the whole default sweep with other seeds and splits, and tabulate what the soups did.

    python -m experiments.model_soups.run                three repeats (about 5 minutes each on 2 cores), then the table
    python -m experiments.model_soups.run --repeats 5    five; finished ingredients are found, not redone

Each repeat has a split, a shared start and a draw of the search space of its own. Every setting was chosen on held-out
splits. Writes results.csv (one row a model, split and repeat), table.md and scatter.png beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from soups.reporting import Report
from soups.stores.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODELS = (
    "linear probe", "shared start", "mean of ingredients", "best single", "uniform soup", "greedy soup", "logit ensemble"
)  # fmt: skip


def sweep(repeat: int, output: Path, extra: list[str]) -> Report:
    """Run one repeat through the command a user types; return its report."""
    place = output / f"repeat-{repeat}"
    command = [
        sys.executable, "train.py", "+soup=greedy", f"sweep.seed={repeat}", f"start.seed={repeat}",
        f"data.split_seed={repeat}", f"pool.path={place / 'pool'}", f"paths.output={place}", "tracking=off", *extra,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    newest = max(place.glob("soups/*/report.json"), key=lambda path: path.stat().st_mtime)
    return Report.load(newest.parent)


def tabulate(reports: list[Report]) -> str:
    """Return the Markdown table: mean ± sd over repeats, in %, of every model on every split."""
    splits = list(reports[0].splits)
    header = ["model", *({"heldout": "held-out"}.get(split, split) for split in splits), "OOD mean"]
    lines = [" | ".join(["", *header, ""]).strip(), "|" + "---|" * len(header)]
    for name in MODELS:
        rows = [report.row(name) for report in reports]
        values = [[row.accuracy[split] for row in rows] for split in splits] + [[row.ood for row in rows]]
        lines.append("| " + " | ".join([name, *map(_cell, values)]) + " |")
    kept = [len(report.members) for report in reports]
    lines += ["", f"Greedy kept {', '.join(map(str, kept))} of {len(reports[0].ingredients)} ingredients.", ""]
    lines += ["Differences within a repeat (mean ± sd, points):", ""]
    for one, two in (
        ("greedy soup", "best single"),
        ("uniform soup", "best single"),
        ("uniform soup", "mean of ingredients"),
        ("logit ensemble", "uniform soup"),
    ):
        parts = []
        for split in ("test", "OOD"):
            change = [_value(report, one, split) - _value(report, two, split) for report in reports]
            parts.append(f"{split} {_cell(change, signed=True)}")
        lines.append(f"- {one} − {two}: {', '.join(parts)}")
    return "\n".join(lines) + "\n"


def _value(report: Report, name: str, split: str) -> float:
    row = report.row(name)
    return row.ood if split == "OOD" else row.accuracy[split]


def _cell(values: list[float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * spread:.2f}"


def draw(reports: list[Report], path: Path) -> None:
    """Draw held-out against OOD accuracy of all repeats, each centred on the mean of its ingredients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    looks = {
        "ingredient": ("#0072b2", "o", 28), "best single": ("#0072b2", "D", 70), "uniform soup": ("#009e73", "^", 100),
        "greedy soup": ("#d55e00", "*", 200), "logit ensemble": ("#cc79a7", "P", 100),
    }  # fmt: skip
    for name, (colour, marker, size) in looks.items():
        points = []
        for report in reports:
            centre = report.row("mean of ingredients")
            rows = [row for row in report.rows if (row.kind == name if name == "ingredient" else row.name == name)]
            points += [
                (100 * (row.accuracy["heldout"] - centre.accuracy["heldout"]), 100 * (row.ood - centre.ood))
                for row in rows
            ]
        hollow = name in ("ingredient", "best single")
        style = {"facecolors": "none", "edgecolors": colour} if hollow else {"color": colour}
        axes.scatter(*zip(*points, strict=True), marker=marker, s=size, label=name, **style)
    axes.axhline(0, color="#999999", lw=0.8)
    axes.axvline(0, color="#999999", lw=0.8)
    axes.set_xlabel("held-out accuracy over the mean of the sweep's ingredients, points")
    axes.set_ylabel("OOD accuracy over the same mean, points")
    axes.set_title(f"{len(reports)} sweeps of {len(reports[0].ingredients)} fine-tunes each")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "model_soups")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    reports = [sweep(number, arguments.output.resolve(), arguments.overrides) for number in range(arguments.repeats)]
    table = tabulate(reports)
    print(table)
    write_text(HERE / "table.md", table)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["repeat", "model", "kind", "split", "accuracy", "loss", "note"])
        for number, report in enumerate(reports):
            for row in report.rows:
                for split in report.splits:
                    writer.writerow([number, row.name, row.kind, split, row.accuracy[split], row.loss[split], row.note])
    draw(reports, HERE / "scatter.png")
    lineage = [report.lineage for report in reports]
    print(json.dumps({"soups": [entry["soup"][:16] for entry in lineage], "versions": lineage[0]["versions"]}))


if __name__ == "__main__":
    main()
