"""Prints the table of README.md from results.csv: accuracy in %, mean ± sd over seeds where there are several.

python -m experiments.multi_task_merging.table
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent


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
    experts = {
        model.removeprefix("expert: "): values for model, values in by_model.items() if model.startswith("expert")
    }
    own = {task: [float(row[task]) for row in experts[task]] for task in tasks}
    table: list[list[str]] = []

    def add(model: str, values: dict[str, list[float]], note: str = "") -> None:
        means = [statistics.mean(each) for each in zip(*values.values(), strict=True)]
        table.append([model, note, *(spread(values[task]) for task in tasks), spread(means)])

    for model, found_rows in by_model.items():
        if model.startswith("expert"):
            continue
        scales = ", ".join(row["lambda"] for row in found_rows) if found_rows[0]["lambda"] else ""
        add(model, {task: [float(row[task]) for row in found_rows] for task in tasks}, scales)
        if model == "pretrained":
            for name, values in experts.items():
                add(f"single: {name}", {task: [float(row[task]) for row in values] for task in tasks})
    add("individual experts", own)
    return tasks, table


def main() -> None:
    tasks, table = rows(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.csv")
    print("| encoder | λ by seed | " + " | ".join([*tasks, "mean"]) + " |")
    print("|---" * (len(tasks) + 3) + "|")
    for row in table:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
