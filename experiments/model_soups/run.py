"""Repeat a whole sweep with other seeds and splits, tabulate what the soups did, and say which aims were reached.

    python -m experiments.model_soups.run                          three repeats of the default task, then the table
    python -m experiments.model_soups.run --task movies_frozen     another task (`TASKS`)
    python -m experiments.model_soups.run --task movies_frozen --first 100 --repeats 2 --develop
                                                                   held-out numbers alone, on seeds for development
    python -m experiments.model_soups.run --task movies_frozen --first 1000 --repeats 10 --threads 1 2
                                                                   ten fresh sweeps, by turns on one and two threads

Each repeat has a split, a base model and a draw of the search space of its own. Settings are chosen on held-out numbers of
development seeds (100 to 199), and judged on seeds that were never used before. Finished sweeps are found, not redone, so an
interrupted command goes on. Writes results.csv (one row a model, split and repeat), table.md and scatter.png beside this file,
with the task's name before the dot for every task but the default one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

from soups.reporting import SoupReport
from soups.stores.files import write_json, write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODELS = (
    "linear probe", "shared start", "mean of ingredients", "best single", "uniform soup", "greedy soup", "logit ensemble"
)  # fmt: skip
# Overrides of a task's sweep.
TASKS: dict[str, list[str]] = {
    "digits": [],
    "movies": ["experiment=movies"],
    "movies_frozen": ["experiment=movies_frozen"],
}
DEFAULT = "digits"
LIMIT = 360.0  # seconds of a whole command on two quiet cores


def sweep(task: str, repeat: int, threads: int | None, output: Path, extra: list[str]) -> tuple[SoupReport, float]:
    """Run one repeat through the command a user types; return its report and the command's seconds, when it ran."""
    place = output / task / f"repeat-{repeat}"
    clock = place / "seconds.json"
    spent: dict[str, float] = json.loads(clock.read_text()) if clock.is_file() else {"seconds": 0.0, "finished": 0}
    if not spent["finished"]:
        command = [
            sys.executable, "train.py", "+soup=greedy", *TASKS[task], f"sweep.seed={repeat}", f"start.seed={repeat}",
            f"data.split_seed={repeat}", f"pool.path={place / 'pool'}", f"paths.output={place}", "tracking=off", *extra,
        ]  # fmt: skip
        command += [f"trainer.threads={threads}"] if threads else []
        began, finished = time.perf_counter(), 0
        try:
            subprocess.run(command, cwd=ROOT, check=True)
            finished = 1
        finally:  # the time of an interrupted sweep counts too
            spent = {"seconds": spent["seconds"] + time.perf_counter() - began, "finished": finished}
            place.mkdir(parents=True, exist_ok=True)
            write_json(clock, spent)
    newest = max(place.glob("soups/*/report.json"), key=lambda path: path.stat().st_mtime)
    return SoupReport.load(newest.parent), spent["seconds"]


def verdict(reports: list[SoupReport], seconds: list[float]) -> str:
    """Return the aims of the default task as Markdown lines, each with what was seen."""
    count = len(reports)
    gains = [_value(report, "greedy soup", "test") - _value(report, "best single", "test") for report in reports]
    error = statistics.stdev(gains) / math.sqrt(count) if count > 1 else math.nan
    not_worse = sum(gain >= 0 for gain in gains)
    above = sum(
        _value(report, "uniform soup", "test") > _value(report, "mean of ingredients", "test") for report in reports
    )
    three = sum(len(report.members) >= 3 for report in reports)
    mean = statistics.mean(gains)
    aims = [
        (not_worse >= 0.8 * count, f"greedy is at least the best single model on test: {not_worse} of {count} (aim: 80 %)"),
        (mean >= 2 * error, f"greedy less best single on test: {100 * mean:+.2f} points, standard error {100 * error:.2f} (aim: two)"),
        (above == count, f"uniform is above the mean of its ingredients on test: {above} of {count} (aim: all)"),
        (three >= 0.8 * count, f"greedy keeps three or more: {three} of {count} (aim: 80 %)"),
        (max(seconds) <= LIMIT, f"seconds of a whole command: {min(seconds):.0f} to {max(seconds):.0f} (aim: at most {LIMIT:.0f})"),
    ]  # fmt: skip
    return "\n".join(f"- {'reached' if reached else 'MISSED'}: {line}" for reached, line in aims) + "\n"


def develop(reports: list[SoupReport]) -> str:
    """Return what settings may be chosen by: held-out accuracies in %, the test and OOD splits unseen."""
    lines = []
    for report in reports:
        values = {
            name: 100 * report.row(name).accuracy["heldout"] for name in MODELS if name in {r.name for r in report.rows}
        }
        shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        lines.append(f"kept {len(report.members)} of {len(report.ingredients)}; held-out: {shown}")
    return "\n".join(lines) + "\n"


def tabulate(reports: list[SoupReport]) -> str:
    """Return the Markdown table: mean ± sd over repeats, in %, of every model on every split."""
    splits = list(reports[0].splits)
    header = ["model", *({"heldout": "held-out"}.get(split, split) for split in splits), "OOD mean"]
    lines = [" | ".join(["", *header, ""]).strip(), "|" + "---|" * len(header)]
    for name in MODELS:
        if any(name not in {row.name for row in report.rows} for report in reports):
            continue  # without shared epochs there is no shared start
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


def _value(report: SoupReport, name: str, split: str) -> float:
    row = report.row(name)
    return row.ood if split == "OOD" else row.accuracy[split]


def _cell(values: list[float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * spread:.2f}"


def draw(reports: list[SoupReport], path: Path) -> None:
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
    parser.add_argument("--task", default=DEFAULT, choices=list(TASKS))
    parser.add_argument("--first", type=int, default=0, help="seed of the first repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", help="of the repeats, by turns; default: torch's choice")
    parser.add_argument("--develop", action="store_true", help="print held-out numbers and write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "model_soups")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    turns: list[int | None] = arguments.threads or [None]
    found = [
        sweep(
            arguments.task, arguments.first + n, turns[n % len(turns)], arguments.output.resolve(), arguments.overrides
        )
        for n in range(arguments.repeats)
    ]
    reports = [report for report, _ in found]
    if arguments.develop:
        print(develop(reports))
        return
    table = f"{tabulate(reports)}\n{verdict(reports, [seconds for _, seconds in found])}"
    print(table)
    before = "" if arguments.task == DEFAULT else f"{arguments.task}_"
    write_text(HERE / f"{before}table.md", table)
    with (HERE / f"{before}results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["repeat", "model", "kind", "split", "accuracy", "loss", "note"])
        for number, report in enumerate(reports, arguments.first):
            for row in report.rows:
                for split in report.splits:
                    writer.writerow([number, row.name, row.kind, split, row.accuracy[split], row.loss[split], row.note])
    draw(reports, HERE / f"{before}scatter.png")
    lineage = [report.lineage for report in reports]
    print(json.dumps({"soups": [entry["soup"][:16] for entry in lineage], "versions": lineage[0]["versions"]}))


if __name__ == "__main__":
    main()
