"""ColD Fusion by round, against pretrained, multitask and fusing once; synchronous against asynchronous with two deaths.

    python -m experiments.cold_fusion.run                 three seeds (8 minutes each on 2 cores), then tables and figures
    python -m experiments.cold_fusion.run --asynchronous 0 1 2

A seed is another split of the texts, other contributors and other fits. The asynchronous runs have four contributor processes
on one folder; two are killed (SIGKILL), after the first and the third push, drawn by the seed. Writes results.csv, table.md
and figures beside this file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.pages import ROOT, curves, differences, repeat, tables, write_results
from soups.protocols.cold_fusion import Repository, replay
from soups.reporting import draw_page
from soups.reporting.page import Curves, Page, Table
from soups.stores.files import write_text

HERE = Path(__file__).parent
PAIRS = (("round 3", "pretrained"), ("round 3", "fused once"), ("round 3", "multitask"), ("multitask", "pretrained"))
KILL_AFTER = (1, 3)  # pushes


def asynchronous(seed: int, output: Path, extra: list[str]) -> Page:
    """Run four contributors at once and kill two; return the report."""
    place = output.resolve() / f"asynchronous-{seed}"
    command = [
        sys.executable, "train.py", "+protocol=cold_fusion", f"pool.path={place / 'pool'}", f"paths.output={place}",
        "tracking=off", f"seed={seed}", "protocol.mode=asynchronous", "protocol.contributors=4", "protocol.multitask=false",
        "protocol.fine_tuned=[]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4", *extra,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    pushed, kills, source = place / "pool" / "repository" / "main" / "pushed", 0, random.Random(seed)
    while process.poll() is None:
        time.sleep(0.5)
        if kills < len(KILL_AFTER) and len(list(pushed.glob("*.json"))) >= KILL_AFTER[kills]:
            workers = contributors(process.pid)
            if workers:
                os.kill(source.choice(workers), signal.SIGKILL)
                kills += 1
                print(f"killed a contributor after {KILL_AFTER[kills - 1]} pushes", file=sys.stderr)
    if process.returncode not in (0, 3):  # 3: contributors died, the report is there
        raise SystemExit(process.returncode)
    repository = Repository(place / "pool" / "repository" / "main")
    assert all(result.same for result in replay(repository)), "the log replays to the same bits"
    newest = max(place.glob("protocols/*/page.json"), key=lambda path: path.stat().st_mtime)
    return Page.load(newest.parent)


def contributors(pid: int) -> list[int]:
    """Return the process ids of contributors below a process, sorted."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    parents = {int(row[0]): int(row[1]) for row in rows}

    def below(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return sorted(int(row[0]) for row in rows if len(row) > 2 and "soups.worker" in row[2] and below(int(row[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--asynchronous", type=int, nargs="*", default=[0], help="seeds of the asynchronous runs")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "cold_fusion")
    parser.add_argument("overrides", nargs="*", help="further overrides for train.py")
    arguments = parser.parse_args()
    extra = list(arguments.overrides)
    pages = repeat("cold_fusion", arguments.seeds, arguments.output, lambda seed: [f"seed={seed}", *extra])
    parts = [
        part
        for page in [Page(title="", subject="protocol", summary="", parts=list(curves(pages)))]
        for part in page.parts
    ]
    text = f"{tables([page.model_copy(update={'parts': page.parts[:3]}) for page in pages])}\nDifferences within a seed (mean ± sd over {len(pages)} seeds, points):\n\n{differences(pages, PAIRS)}"
    for seed in arguments.asynchronous:
        page = asynchronous(seed, arguments.output, extra)
        curve, table = page.parts[1], page.parts[0]
        assert isinstance(curve, Curves)
        assert isinstance(table, Table)
        alike = pages[arguments.seeds.index(seed)].parts[1] if seed in arguments.seeds else None
        series = {f"asynchronous, {name}": values for name, values in curve.series.items() if "linear probe" in name}
        if isinstance(alike, Curves):
            series |= {
                f"synchronous, {name}": values for name, values in alike.series.items() if "linear probe" in name
            }
        parts.append(curve.model_copy(update={"title": f"Synchronous and asynchronous, seed {seed}", "series": series}))
        text += f"\n**Asynchronous, two of four contributors killed, seed {seed}**\n\n{tables([page.model_copy(update={'parts': [table]})])}"
    print(text)
    write_text(HERE / "table.md", text)
    write_results(pages, arguments.seeds, HERE / "results.csv")
    draw_page(Page(title="ColD Fusion", subject="protocol", summary="", parts=parts), HERE)


if __name__ == "__main__":
    main()
