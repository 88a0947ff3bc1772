"""What does each launcher cost, and do all make the same soup?

    python -m benchmarks.launchers            about 18 minutes on 2 cores
    python -m benchmarks.launchers --quick    short fits, to see that it runs

One sweep of four fits of the default task, with one thread each, on Hydra's basic launcher, joblib, submitit's local
processes and a Ray cluster started for it (those that are installed), two fits at once where the launcher can. Prints the
wall time from the command to the closing table over the sum of the basic launcher's fits, which is what one process would
need for the fits alone; and whether ingredients and soup have the same hashes. The shared start and its predictions are
made before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from soups.stores.pool import Pool

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "basic": ("hydra", []),
    "joblib": ("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
    "submitit, local": ("submitit", ["hydra/launcher=submitit_local_capped", "hydra.launcher.jobs=2"]),
    "Ray, local": ("ray", ["hydra/launcher=ray_local", "hydra.launcher.jobs=2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    size = ["sweep.space.trainer.max_epochs=1", "data.train=300"] if arguments.quick else []
    small = ["start.epochs=1", "data.test=300", "data.corruptions=[noise]", "trainer.threads=1"]
    base = [sys.executable, "train.py", "+soup=greedy", "tracking=off", *size, *small]
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        command = [*base, "sweep.size=1", f"pool.path={first}/pool", f"paths.output={first}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        fits, reference = 0.0, None
        for number, (name, (package, launcher)) in enumerate(LAUNCHERS.items()):
            if find_spec(package) is None:
                print(f"{name}: left out, {package} is not installed")
                continue
            place = Path(scratch) / str(number)
            shutil.copytree(first / "pool" / "starts", place / "pool" / "starts")
            command = [*base, *launcher, "sweep.size=4", f"pool.path={place}/pool", f"paths.output={place}"]
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            wall = time.perf_counter() - began
            records = Pool(place / "pool").ingredients()
            (path,) = place.glob("soups/*/report.json")
            report = json.loads(path.read_text())
            found = ({record.fingerprint: record.weights for record in records}, report["lineage"]["soup"])
            own = sum(record.durations["fit"] for record in records)
            cooking = sum(report["seconds"].values())
            fits, reference = fits or own, reference or found
            print(
                f"{name}: wall {wall:.1f} s, {wall / fits:.2f} of the sequential fits ({fits:.1f} s; here they took "
                f"{own:.1f} s); without search and evaluation ({cooking:.1f} s) {(wall - cooking) / fits:.2f}; "
                f"{'the same ingredients and soup' if found == reference else 'OTHER INGREDIENTS OR SOUP'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
