"""The experts of a task suite, merged into one backbone by each method and judged on every task.

    python -m experiments.multi_task_merging.run                    text suite; makes the experts first, where they are missing
    python -m experiments.multi_task_merging.run --suite images     another one of conf/suite, or a YAML file
    python -m experiments.multi_task_merging.table                  prints the table of README.md

Each task keeps the head that its expert was trained under. λ of each method is the best of a few on the held-out splits (mean
accuracy over tasks); the test splits are looked at once, with the λ that was chosen. Rows that results.csv has are not made
again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from soups.merging import make_method, merge
from soups.suites import TaskSuite, read_suite
from soups.weights import Weights

HERE = Path(__file__).parent

# Method, its parameters at λ = 1, and the values of λ to choose from; θ = θ_0 + λ · (merged − θ_0).
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "average": ("linear", {}, (1.0,)),
    "task arithmetic": ("task_arithmetic", {"scale": 1.0}, (0.2, 0.3, 0.5)),
    "TIES": ("ties", {"density": 0.2}, (0.5, 1.0, 1.5)),
    "DARE-TIES": ("dare_ties", {"density": 0.5}, (0.5, 1.0, 1.5)),
    "Breadcrumbs": ("breadcrumbs", {"scale": 1.0}, (0.2, 0.3, 0.5)),
    "TSV-M": ("tsv", {"exclude": ("*embeddings*",)}, (0.5, 1.0, 1.5)),
    "Iso-C": ("iso_c", {"exclude": ("*embeddings*",)}, (0.5, 1.0, 1.5)),
}
DEFAULT = ("average", "task arithmetic", "TIES", "TSV-M", "Iso-C")


def accuracies(suite: TaskSuite, weights: Weights, split: str) -> dict[str, float]:
    return {task: score.accuracy for task, score in suite.evaluate(weights, split).items()}


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def merged(suite: TaskSuite, label: str, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the λ that is best on held-out data, and the merged backbone at it."""
    name, parameters, scales = METHODS[label]
    method = make_method(name, **parameters, **({"seed": seed} if name.startswith("dare") else {}))
    paths = [suite.expert_path(task) for task in suite.tasks]
    end = cast(dict[str, torch.Tensor], merge(method, paths, base=None if name == "linear" else suite.base_path))

    def at(scale: float) -> dict[str, torch.Tensor]:
        return {
            key: torch.lerp(suite.base[key], value, scale) if value.is_floating_point() else value
            for key, value in end.items()
        }

    if len(scales) == 1:
        return scales[0], at(scales[0])
    best = max(scales, key=lambda scale: mean(accuracies(suite, at(scale), "heldout")))
    return best, at(best)


def one_seed(suite: TaskSuite, seed: int, methods: list[str], write: Any) -> None:
    """Evaluate the base model, the experts and each merge on the test splits."""
    suite.prepare()
    write("linear probe", lambda: ("", accuracies(suite, suite.base, "test")))
    for task in suite.tasks:
        write(f"expert: {task}", lambda task=task: ("", accuracies(suite, suite.experts[task], "test")))
    for label in methods:

        def make(label: str = label) -> tuple[float, dict[str, float]]:
            scale, weights = merged(suite, label, seed)
            return scale, accuracies(suite, weights, "test")

        write(label, make)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--suite", default="texts", help="name in conf/suite, or a YAML file")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the fits; the data stay")
    arguments.add_argument("--methods", nargs="+", default=list(DEFAULT), choices=list(METHODS))
    arguments.add_argument("--out", type=Path, help="default: results_<suite>.csv beside this file")
    arguments.add_argument("--threads", type=int, help="default: torch's choice")
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec = read_suite(options.suite)
    out = options.out or HERE / f"results_{spec.name}.csv"
    done: set[tuple[str, str]] = set()
    if out.exists():
        with out.open() as file:
            done = {(row["seed"], row["model"]) for row in csv.DictReader(file)}
    with out.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(["seed", "model", "lambda", *spec.tasks])
        for seed in options.seeds:
            suite, began = TaskSuite(spec.model_copy(update={"seed": seed})), time.process_time()

            def write(model: str, make: Any, seed: int = seed, began: float = began) -> None:
                if (str(seed), model) in done:
                    return
                scale, values = make()
                writer.writerow([seed, model, scale, *(f"{values[task]:.4f}" for task in spec.tasks)])
                file.flush()
                print(
                    f"seed {seed}: {model} {100 * mean(values):.1f}, {time.process_time() - began:.0f} CPU-s",
                    file=sys.stderr,
                )

            one_seed(suite, seed, options.methods, write)


if __name__ == "__main__":
    main()
