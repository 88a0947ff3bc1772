"""Every recipe on the same sweeps: what it gains, and what it costs.

    python -m experiments.recipes.run trainer.threads=1        three sweeps of the default task, then the table
    python -m experiments.recipes.run --name movies experiment=movies trainer.threads=1        the text task

Each sweep is `experiments.model_soups.run`'s: a split, a shared start and a draw of the search space of its own; what its
pool holds is found, not redone. Every recipe then runs in a process of its own, forked from one that has the data, so that
its time and its peak memory are its own. Soups are evaluated after that. Needs Linux, for the peak.

Writes NAME.csv (one row a model, split and repeat), NAME.md and NAME.png beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from soups.evaluation import decompose, ensemble, negative_flip_rate, ood_mean, score
from soups.evaluation.diversity import locality
from soups.evaluation.statistics import wilson
from soups.fitting.run import run_of
from soups.launch.settings import configuration_of
from soups.recipes import Soup
from soups.soup_making.evaluator import SoupEvaluator
from soups.soup_making.ingredients import choose_ingredients, open_ingredients, reference_of
from soups.soup_making.models import LazyWeights
from soups.soup_making.options import SoupOptions
from soups.soup_making.selection import run_recipe
from soups.soup_making.soup import options_of_run
from soups.stores import read_safetensors, write_safetensors
from soups.stores.files import fingerprint, write_json, write_text
from soups.weights import hash_weights

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Name in the table, recipe, options. DiWA is uniform or greedy on these candidates; the tests hold it to that.
RECIPES: list[tuple[str, str, dict[str, Any]]] = [
    ("uniform", "uniform", {}),
    ("greedy, ≥", "greedy", {"ties": "paper"}),
    ("greedy, >", "greedy", {"ties": "official"}),
    ("greedy with removal", "greedy_removal", {}),
    ("greedy with weights", "greedy_weights", {"rounds": 3}),
    ("top-k", "top_k", {}),
    ("learned, by model", "learned", {"per": "model"}),
    ("learned, by tensor", "learned", {"per": "tensor"}),
    ("WiSE-FT, best single", "wise_ft", {"end": "best", "points": 6}),
    ("WiSE-FT, uniform", "wise_ft", {"end": "uniform", "points": 6}),
    ("BCWI, plain", "bcwi", {"form": "plain", "points": 6}),
    ("BCWI, soup", "bcwi", {"form": "soup", "points": 6}),
    ("BCWI, Fisher", "bcwi", {"form": "fisher", "points": 6}),
    ("interpolation of two", "interpolation", {}),
]
# On these a path is shown in and out of distribution.
SHOWN = "WiSE-FT, uniform"


def prepare(repeat: int, output: Path, extra: list[str]) -> tuple[SoupEvaluator, list[Any], Any]:
    """Make the sweep of one repeat, or find it; return what recipes work with."""
    place = output / f"repeat-{repeat}"
    overrides = [
        f"sweep.seed={repeat}", f"start.seed={repeat}", f"data.split_seed={repeat}", f"pool.path={place / 'pool'}",
        f"paths.output={place}", "tracking=off", *extra,
    ]  # fmt: skip
    subprocess.run([sys.executable, "train.py", "+soup=greedy", *overrides], cwd=ROOT, check=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = run_of(configuration_of(compose("train", ["+soup=wise_ft", *overrides])))
    torch.set_num_threads(run.layout.devices.threads or 1)
    options, pool = options_of_run(run), open_ingredients(run)
    ingredients = choose_ingredients(run, options, pool).ingredients
    return SoupEvaluator(run, options, pool), ingredients, reference_of(run, options)


def resident(key: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) / 1024


def run_alone(
    evaluator: SoupEvaluator,
    members: list[Any],
    origin: Any,
    recipe: str,
    options: dict[str, Any],
    place: Path,
    with_path: bool,
) -> None:
    """Run one recipe in this process and leave its soup and its cost at `place`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    section = {"recipe": recipe, "metric": evaluator.metric, **options}
    evaluator.options = SoupOptions.read(section)
    soup = run_recipe(evaluator, recipe, evaluator.candidates(members), origin)
    cost = {"seconds": time.perf_counter() - began, "peak": resident("VmHWM") - before, "evaluations": evaluator.asked}
    save(soup, place, cost, with_path)


def save(soup: Soup, place: Path, cost: dict[str, Any], with_path: bool) -> None:
    write_safetensors(place / "soup.safetensors", soup.weights)
    for number, point in enumerate(soup.path if with_path else []):
        write_safetensors(place / f"path-{number}.safetensors", point.load())
    found = {
        **cost,
        "heldout": soup.score,
        "coefficients": soup.coefficients,
        "details": soup.details,
        "path": [point.position for point in soup.path],
    }
    write_json(place / "result.json", found)


def study(repeat: int, output: Path, extra: list[str]) -> dict[str, Any]:
    """Return everything measured on one repeat."""
    evaluator, members, origin = prepare(repeat, output, extra)
    splits = ["heldout", *evaluator.run.splits.reported()]
    evaluator.heldout_batches()  # before the forks, so that loading counts for none
    identity = fingerprint(sorted(record.weights for record in members))[:8]
    found: dict[str, Any] = {}
    for name, recipe, options in RECIPES:
        place = output / f"repeat-{repeat}" / "recipes" / f"{identity}-{fingerprint([recipe, options])[:8]}"
        if not (place / "result.json").exists():
            place.mkdir(parents=True, exist_ok=True)
            process = multiprocessing.get_context("fork").Process(
                target=run_alone, args=(evaluator, members, origin, recipe, options, place, name == SHOWN)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} failed with exit code {process.exitcode}.")
        found[name] = json.loads((place / "result.json").read_text()) | {"place": place}
        print(
            f"repeat {repeat}: {name}: held-out {found[name]['heldout']:.4f}, {found[name]['seconds']:.0f} s",
            flush=True,
        )

    pool = evaluator.pool
    models: dict[str, Any] = {
        "shared start": (origin.weights_hash, origin.load),
        **{record.short: (record.weights, lambda n=record.fingerprint: pool.weights(n)) for record in members},
    }
    for name, result in found.items():
        path = result["place"] / "soup.safetensors"
        models[name] = (hash_weights(read_safetensors(path)), lambda path=path: read_safetensors(path))
        if name == SHOWN:
            for number, position in enumerate(result["path"]):
                point = result["place"] / f"path-{number}.safetensors"
                models[f"{name} at {position}"] = (
                    hash_weights(read_safetensors(point)),
                    lambda p=point: read_safetensors(p),
                )
    logits: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    for split in splits:
        for name, (weights_hash, load) in models.items():
            logits[name][split] = evaluator.logits(LazyWeights(load), split, weights_hash)
    names = [record.short for record in members]
    logits["logit ensemble"] = {split: ensemble([logits[name][split] for name in names]) for split in splits}
    best = max(members, key=lambda record: evaluator.sign * record.heldout(evaluator.metric)).short
    logits["best single"] = logits[best]
    labels = {split: evaluator.labels(split) for split in splits}
    accuracy = {
        name: {split: score(values[split], labels[split]).accuracy for split in splits}
        for name, values in logits.items()
    }
    accuracy["mean of ingredients"] = {split: statistics.mean(accuracy[n][split] for n in names) for split in splits}
    flips = {
        name: negative_flip_rate(logits["shared start"]["test"], values["test"], labels["test"])
        for name, values in logits.items()
    }
    return {
        "accuracy": accuracy, "flips": flips, "results": found, "names": names, "logits": logits, "labels": labels,
        "splits": splits, "heldout": len(labels["heldout"]), "test": len(labels["test"]),
    }  # fmt: skip


def spread(values: list[float], factor: float = 100.0, digits: int = 2, signed: bool = False) -> str:
    mean = f"{factor * statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def tabulate(studies: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown: mean ± sd over the repeats."""
    has_ood = len(studies[0]["splits"]) > 2
    lines = [
        "| model | held-out | test | OOD mean | test − best single | OOD − best single | negative flips | evaluations | seconds | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = ["shared start", "mean of ingredients", "best single", *(name for name, _, _ in RECIPES), "logit ensemble"]
    for name in rows:
        found = [study["accuracy"][name] for study in studies]
        best = [study["accuracy"]["best single"] for study in studies]
        cost = [study["results"].get(name) for study in studies]
        lines.append(
            f"| {name} | {spread([a['heldout'] for a in found])} | {spread([a['test'] for a in found])} | "
            + (f"{spread([ood_mean(a) for a in found])} | " if has_ood else "| ")
            + f"{spread([a['test'] - b['test'] for a, b in zip(found, best, strict=True)], signed=True)} | "
            + (
                f"{spread([ood_mean(a) - ood_mean(b) for a, b in zip(found, best, strict=True)], signed=True)} | "
                if has_ood
                else "| "
            )
            + (f"{spread([study['flips'][name] for study in studies])} | " if name in studies[0]["flips"] else "| ")
            + (
                f"{statistics.mean(c['evaluations'] for c in cost):.0f} | {spread([c['seconds'] for c in cost], 1, 0)} | "
                f"{spread([c['peak'] for c in cost], 1, 0)} |"
                if cost[0]
                else "| | |"
            )
        )
    typical, count = statistics.mean(study["accuracy"]["best single"]["test"] for study in studies), studies[0]["test"]
    interval = wilson(round(typical * count), count)
    lines += [
        "",
        f"95 % interval of one model with {100 * typical:.2f} % of {count} test samples right: {100 * interval.low:.2f} to "
        f"{100 * interval.high:.2f} (Wilson); the CSV file has each number's own.",
        "",
        *decomposition(studies),
    ]
    return "\n".join(lines) + "\n"


def decomposition(studies: list[dict[str, Any]]) -> list[str]:
    """Take the error apart on OOD splits that all repeats share (DiWA, arXiv:2205.09739)."""
    lines: list[str] = []
    for split in studies[0]["splits"][2:]:
        first = studies[0]["labels"][split]
        same = all(torch.equal(study["labels"][split], first) for study in studies)
        if len(studies) < 2 or not same:  # corrupted test samples are others in each repeat
            continue
        members = min(len(study["names"]) for study in studies)
        table = torch.stack(
            [torch.stack([study["logits"][name][split] for name in study["names"][:members]]) for study in studies]
        )
        terms = decompose(table, first)
        soups = torch.stack([study["logits"]["uniform"][split] for study in studies])
        cost = locality(terms, soups, first)
        lines.append(
            f"Squared error on {split} over {len(studies)} sweeps of {members} (DiWA's decomposition): bias² {terms.bias:.4f}, "
            f"variance {terms.variance:.4f}, covariance {terms.covariance:.4f}; ensemble {terms.ensemble:.4f}, uniform soup "
            f"{terms.ensemble + cost:.4f}: locality costs {cost:+.4f}."
        )
    return lines


def draw(studies: list[dict[str, Any]], path: Path) -> None:
    """Draw all recipes against the best single model, and the paths in and out of distribution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["best single", *(name for name, _, _ in RECIPES), "logit ensemble"]
    markers = "DosvP^<*XhHdp8>1"
    for name, marker in zip(names, markers, strict=True):
        points = []
        for study in studies:
            centre, own = study["accuracy"]["mean of ingredients"], study["accuracy"][name]
            points.append((100 * (own["test"] - centre["test"]), 100 * (ood_mean(own) - ood_mean(centre))))
        x, y = zip(*points, strict=True)
        left.errorbar(
            statistics.mean(x), statistics.mean(y), marker=marker, ms=8, ls="", label=name,
            xerr=statistics.stdev(x) / len(x) ** 0.5 if len(x) > 1 else None,
            yerr=statistics.stdev(y) / len(y) ** 0.5 if len(y) > 1 else None, elinewidth=0.6,
        )  # fmt: skip
    left.axhline(0, color="#999999", lw=0.8)
    left.axvline(0, color="#999999", lw=0.8)
    left.set_xlabel("test accuracy over the mean of ingredients, points")
    left.set_ylabel("OOD accuracy over the same, points")
    left.set_title(f"Mean and standard error of {len(studies)} sweeps")
    left.legend(fontsize=6.5, frameon=False, ncols=2)
    for number, study in enumerate(studies):
        positions = study["results"][SHOWN]["path"]
        on_path = [study["accuracy"][f"{SHOWN} at {position}"] for position in positions]
        right.plot(
            [100 * a["test"] for a in on_path],
            [100 * ood_mean(a) for a in on_path],
            "o-",
            ms=3,
            label=f"sweep {number}",
        )
        right.plot(100 * on_path[0]["test"], 100 * ood_mean(on_path[0]), "ks", ms=6)
    right.set_xlabel("test accuracy, %")
    right.set_ylabel("mean OOD accuracy, %")
    right.set_title("WiSE-FT: shared start (square) to uniform soup")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="digits")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / "outputs" / ("model_soups" if arguments.name == "digits" else arguments.name)
    studies = [study(number, output.resolve(), arguments.overrides) for number in range(arguments.repeats)]
    table = tabulate(studies)
    print(table)
    write_text(HERE / f"{arguments.name}.md", table)
    with (HERE / f"{arguments.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["repeat", "model", "split", "accuracy", "low", "high"])
        for number, found in enumerate(studies):
            for name, accuracy in found["accuracy"].items():
                for split, value in accuracy.items():
                    count = len(found["labels"][split])
                    interval = wilson(round(value * count), count)
                    bounds = ["", ""] if name == "mean of ingredients" else [interval.low, interval.high]
                    writer.writerow([number, name, split, value, *bounds])
    draw(studies, HERE / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
