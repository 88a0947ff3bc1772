"""Prints the table of README.md from results_<suite>.csv: test accuracy in %, mean ± sd over seeds where there are several.

    python -m experiments.multi_task_merging.table [results_texts.csv]

"lost" is the mean accuracy of the individual experts less that of the row, in points.
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIRST = "linear probe"


def spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the tasks and the rows of the table."""
    with path.open() as file:
        found = list(csv.DictReader(file))
    tasks = [name for name in found[0] if name not in ("seed", "model", "lambda")]
    by_model: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_model.setdefault(row["model"], []).append(row)
    experts = {model.removeprefix("expert: "): rows for model, rows in by_model.items() if model.startswith("expert: ")}
    own = {task: [float(row[task]) for row in experts[task]] for task in tasks}
    best = means(own)
    table: list[list[str]] = []

    def add(model: str, values: dict[str, list[float]], note: str = "") -> None:
        found = means(values)
        lost = [one - two for one, two in zip(best, found, strict=False)]
        table.append([model, note, *(spread(values[task]) for task in tasks), spread(found), spread(lost)])

    for model, of_model in by_model.items():
        if not model.startswith("expert: "):
            scales = ", ".join(row["lambda"] for row in of_model if row["lambda"])
            add(model, {task: [float(row[task]) for row in of_model] for task in tasks}, scales)
        if model == FIRST:
            for name, of_expert in experts.items():
                add(f"expert: {name}", {task: [float(row[task]) for row in of_expert] for task in tasks})
    add("individual experts", own)
    return tasks, table


def means(values: dict[str, list[float]]) -> list[float]:
    """Return the mean over tasks of each seed."""
    return [statistics.mean(each) for each in zip(*values.values(), strict=True)]


def main() -> None:
    tasks, table = rows(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results_texts.csv")
    print("| backbone | λ by seed | " + " | ".join([*tasks, "mean", "lost"]) + " |")
    print("|---" * (len(tasks) + 4) + "|")
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
