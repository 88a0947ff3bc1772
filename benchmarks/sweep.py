"""What does a sweep cost over its fits, and a soup over reading its files?

    python -m benchmarks.sweep            about 6 minutes on 2 cores
    python -m benchmarks.sweep --quick    short fits, to see that it runs

Prints ratios, each measured within this one run:
- wall time of the sweep (from the command to the closing table) over the sum of its fits, one at a time and two at once;
- time to build a uniform soup over a plain read of the same files, page cache warm, and the same against a loop of
  `torch.load` that averages state dicts, which is what people write by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from soups.recipes import Candidate, uniform
from soups.stores.pool import Pool

ROOT = Path(__file__).parents[1]


def sweep_overhead(folder: Path, quick: bool) -> None:
    # The fits are the default task's; the start is short and the reported splits are small, since neither is in question.
    size = ["sweep.size=3", "sweep.space.trainer.max_epochs=1", "data.train=300"] if quick else ["sweep.size=5"]
    small = ["start.epochs=1", "data.test=300", "data.corruptions=[noise]"]
    base = [sys.executable, "train.py", "+soup=greedy", "tracking=off", *size, *small]
    # The shared start is made before the clock starts: it is paid once a pool, whatever the size of the sweep.
    for name, launcher in (
        ("one at a time (basic)", []),
        ("two at once (joblib)", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=1"]),
    ):
        place = folder / name.split()[-1].strip("()")
        command = [*base, *launcher, f"pool.path={place}/pool", f"paths.output={place}"]
        subprocess.run([*command, "sweep.size=1"], cwd=ROOT, check=True, capture_output=True)
        before = {record.fingerprint for record in Pool(place / "pool").ingredients()}
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        wall = time.perf_counter() - began
        new = [record for record in Pool(place / "pool").ingredients() if record.fingerprint not in before]
        fits = sum(record.durations["fit"] for record in new)
        report = json.loads(max(place.glob("soups/*/report.json"), key=lambda p: p.stat().st_mtime).read_text())
        cooking = sum(report["seconds"].values())
        print(
            f"{name}: {len(new)} fits, sum of fits {fits:.1f} s, wall {wall:.1f} s, ratio {wall / fits:.2f}; "
            f"of the wall, search and evaluation on all splits {cooking:.1f} s, ratio without them "
            f"{(wall - cooking) / fits:.2f}"
        )


def best(function: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def construction(folder: Path, models: int = 8) -> None:
    import timm

    pool = Pool(folder / "pool")
    from soups.stores.pool import Ingredient

    plain: list[Path] = []
    for number in range(models):
        torch.manual_seed(number)
        weights = timm.create_model("tf_efficientnet_lite0", num_classes=10).state_dict()
        pool.add(Ingredient(fingerprint=f"{number:064x}", determinants={"number": number}), weights)
        plain.append(folder / f"{number}.pth")
        torch.save(weights, plain[-1])
    files = sorted((folder / "pool").rglob("weights.safetensors"))
    names = [record.fingerprint for record in pool.ingredients()]

    def read() -> None:
        for file in files:
            file.read_bytes()

    def soup() -> None:
        uniform([Candidate(name, 0.0, lambda name=name: pool.weights(name)) for name in names], lambda weights: 0.0)

    def by_hand() -> None:
        states = [torch.load(file, weights_only=True) for file in plain]
        {key: sum(state[key] / len(states) for state in states) for key in states[0]}

    times = {"plain read": best(read), "uniform soup": best(soup), "torch.load loop, all in memory": best(by_hand)}
    total = sum(file.stat().st_size for file in files)
    print(f"{models} models, {total / 1e6:.0f} MB in all, {torch.get_num_threads()} threads, best of 7:")
    for name, seconds in times.items():
        print(f"  {name}: {1e3 * seconds:.1f} ms, {seconds / times['plain read']:.2f} of the plain read")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        construction(Path(scratch) / "construction")
        sweep_overhead(Path(scratch), arguments.quick)


if __name__ == "__main__":
    main()
