"""How fast and how large is a merge, beside a plain copy, mergekit, and a loop over torch.load?

    python benchmarks/merging.py --size 0.25                     # five fine-tunes and a base of 0.25 GB each, bfloat16
    python benchmarks/merging.py --size 1 --methods linear,ties --mergekit /path/to/python
    python benchmarks/merging.py --paired --methods linear       # beside the plain copy, by turns in one process
    python benchmarks/merging.py --scaling                       # time and memory against model size and number of models

Every run is a process of its own, start-up included, its inputs in the page cache. The floor reads the same inputs and
writes one output, in pieces of 1 MiB, which stays in the page cache. CPU seconds are user + system; RSS is the process's peak, mapped files included (torch's
libraries; the models where mergekit and torch.load map them), and beside it the part that is no mapped file. `--mergekit` is a Python that has it: pip install mergekit==0.1.5.

`--paired` is for ratios to the copy: copy and merge run by turns in one process, whose start is not counted. A copy in a process
of its own is no steady measure where unused memory goes back to a virtual machine's host and is slow to come again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

PARAMETERS = {
    "linear": ("{weight: 0.2}", "{}", False),
    "task_arithmetic": ("{weight: 0.3}", "{}", True),
    "multislerp": ("{weight: 0.2}", "{}", True),
    "karcher": ("{}", "{}", False),
    "model_stock": ("{}", "{}", True),
    "dare_linear": ("{weight: 0.3, density: 0.5}", "{}", True),
    "dare_ties": ("{weight: 0.3, density: 0.5}", "{}", True),
    "ties": ("{weight: 0.3, density: 0.2}", "{}", True),
    "breadcrumbs": ("{weight: 0.3, density: 0.9}", "{}", True),
    "della": ("{weight: 0.3, density: 0.5}", "{}", True),
    "sce": ("{}", "{select_topk: 0.2}", True),
}

COPY = """
import os, sys
*sources, target, flush = sys.argv[1:]
with open(target, "wb") as out:
    for number, source in enumerate(sources):
        with open(source, "rb") as file:
            while piece := file.read(1 << 20):
                if number == 0:
                    out.write(piece)
    if flush == "flush":
        out.flush()
        os.fsync(out.fileno())
"""

NAIVE = """
import sys, torch
*sources, target = sys.argv[1:]
total = None
for source in sources:
    weights = torch.load(source, weights_only=True)
    if total is None:
        total = {name: tensor.float() for name, tensor in weights.items()}
    else:
        for name, tensor in weights.items():
            total[name] += tensor
torch.save({name: (tensor / len(sources)).bfloat16() for name, tensor in total.items()}, target)
"""


class Cost(NamedTuple):
    """What one process took: seconds, seconds, GiB at the peak, GiB of it that is no mapped file (libraries, inputs)."""

    wall: float
    cpu: float
    rss: float
    own: float


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Return a Llama's tensors, about `gigabytes` in bfloat16."""
    hidden = 512 if gigabytes < 0.2 else 768 if gigabytes < 0.6 else 1024 if gigabytes < 2 else 2048
    inner, vocabulary = hidden * 8 // 3 // 64 * 64, 8_000 if gigabytes < 0.2 else 32_000
    per_layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / per_layer))
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            result[f"{name}self_attn.{part}_proj.weight"] = (hidden, hidden)
        result[f"{name}mlp.gate_proj.weight"] = result[f"{name}mlp.up_proj.weight"] = (inner, hidden)
        result[f"{name}mlp.down_proj.weight"] = (hidden, inner)
        result[f"{name}input_layernorm.weight"] = result[f"{name}post_attention_layernorm.weight"] = (hidden,)
    return {**result, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def generate(folder: Path, gigabytes: float, models: int, torch_files: bool) -> list[Path]:
    """Write a base and fine-tunes of it, also as torch files if asked for; existing ones are kept."""
    import torch
    from safetensors.torch import save_file

    wanted = shapes(gigabytes)
    paths = [folder / ("base" if number == 0 else f"m{number}") for number in range(models + 1)]
    for number, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        weights: dict[str, torch.Tensor] = {}
        for place, (name, shape) in enumerate(wanted.items()):
            base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(place))
            if number:
                base += 0.002 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * number + place))
            weights[name] = base.bfloat16()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        if torch_files:
            torch.save(weights, path / "weights.pt")
        hidden, layers = wanted["model.norm.weight"][0], sum("q_proj" in name for name in wanted)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": wanted["model.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": wanted["lm_head.weight"][0],
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
        }
        (path / "config.json").write_text(json.dumps(config))
    return paths


def prepared(folder: Path, gigabytes: float, models: int, torch_files: bool) -> list[Path]:
    """Generate models in a process of their own (a child's peak RSS includes its parent's before it starts); warm the cache."""
    arguments = [str(folder), str(gigabytes), str(models), "yes" if torch_files else ""]
    code = "import sys, runpy; m = runpy.run_path(sys.argv[1]); from pathlib import Path; "
    code += "m['generate'](Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), bool(sys.argv[5]))"
    subprocess.run([sys.executable, "-c", code, __file__, *arguments], check=True)
    paths = [folder / ("base" if number == 0 else f"m{number}") for number in range(models + 1)]
    for path in paths:
        with (path / "model.safetensors").open("rb") as file:
            while file.read(1 << 20):
                pass
    return paths


def configuration(method: str, paths: list[Path], models: int) -> str:
    """Return the YAML of a merge of the first models."""
    own, shared, base = PARAMETERS[method]
    listed = "".join(f"- model: {path}\n  parameters: {own}\n" for path in paths[1 : models + 1])
    start = f"base_model: {paths[0]}\n" if base else ""
    return f"models:\n{listed}{start}merge_method: {method}\nparameters: {shared}\ndtype: bfloat16\n"


def measure(command: list[str], threads: int) -> Cost:
    """Run a process and return what it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    own = 0.0
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            own = max(own, anonymous(process.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - start
        if ended[1]:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)[:200]} failed:\n{errors.read().decode()[-2000:]}")
    usage = ended[2]
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, own)


def anonymous(pid: int) -> float:
    """Return the GiB of a process's resident memory that are no mapped file; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("RssAnon")), 0.0)


def best(command: list[str], threads: int, repeats: int, output: Path) -> Cost:
    """Return the fastest of several runs."""
    costs: list[Cost] = []
    for _ in range(repeats):
        for path in (output, output.with_suffix(".safetensors")):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
        costs.append(measure(command, threads))
    return min(costs, key=lambda cost: cost.wall)


def floor(paths: list[Path], models: int, base: bool, output: Path, repeats: int, flush: bool = False) -> Cost:
    """Return the cost of reading the same inputs and writing one output, to the page cache or to the disk."""
    inputs = [str(path / "model.safetensors") for path in paths[0 if base else 1 : models + 1]]
    how = "flush" if flush else "leave"
    return best([sys.executable, "-c", COPY, *inputs, str(output.with_suffix(".safetensors")), how], 1, repeats, output)


def soups_run(method: str, paths: list[Path], models: int, work: Path, threads: int, repeats: int) -> Cost:
    """Return the cost of `soups merge`."""
    (work / "merge.yml").write_text(configuration(method, paths, models))
    command = [sys.executable, "-m", "soups.cli", "merge", str(work / "merge.yml"), str(work / "out")]
    return best([*command, "--quiet", "--threads", str(threads)], threads, repeats, work / "out")


def mergekit_run(
    python: str, method: str, paths: list[Path], models: int, work: Path, threads: int, repeats: int
) -> Cost:
    """Return the cost of `mergekit-yaml`."""
    (work / "merge.yml").write_text(configuration(method, paths, models))
    code = "from mergekit.scripts.run_yaml import main; main()"
    command = [python, "-c", code, str(work / "merge.yml"), str(work / "out"), "--quiet"]
    return best(command, threads, repeats, work / "out")


def show(name: str, cost: Cost, against: Cost) -> None:
    print(
        f"| {name} | {cost.wall:.2f} | {cost.cpu:.2f} | {cost.rss:.2f} | {cost.own:.2f} | {cost.wall / against.wall:.1f} | "
        f"{cost.cpu / against.cpu:.1f} |",
        flush=True,
    )


def compare(arguments: argparse.Namespace, work: Path) -> None:
    """Print the table of methods."""
    paths = prepared(work / f"{arguments.size}", arguments.size, arguments.models, not arguments.skip_naive)
    if arguments.prepare:
        return
    one = (paths[0] / "model.safetensors").stat().st_size / 1e9
    print(
        f"{arguments.models} models and a base of {one:.2f} GB, bfloat16; {arguments.threads} threads; best of {arguments.repeats}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(
        "\n| run | wall s | CPU s | peak RSS GiB | no mapped file | wall / floor | CPU / floor |\n|---|---|---|---|---|---|---|"
    )
    floors = {base: floor(paths, arguments.models, base, work / "out", arguments.repeats) for base in (False, True)}
    show("floor, no base", floors[False], floors[False])
    show("floor, with base", floors[True], floors[True])
    flushed = floor(paths, arguments.models, False, work / "out", arguments.repeats, flush=True)
    show("floor, no base, flushed to the disk as a merge is", flushed, floors[False])
    start = best([sys.executable, "-c", "import torch"], 1, arguments.repeats, work / "out")
    show("import torch", start, floors[False])
    if not arguments.skip_naive:
        inputs = [str(path / "weights.pt") for path in paths[1:]]
        show(
            "torch.load loop",
            best([sys.executable, "-c", NAIVE, *inputs, str(work / "out.pt")], 1, 1, work / "out"),
            floors[False],
        )
    for method in arguments.methods.split(",") if arguments.methods else PARAMETERS:
        against = floors[PARAMETERS[method][2]]
        ours = soups_run(method, paths, arguments.models, work, arguments.threads, arguments.repeats)
        show(f"soups {method}", ours, against)
        net = Cost(ours.wall - start.wall, ours.cpu - start.cpu, ours.rss - start.rss, ours.own - start.own)
        show(f"soups {method}, beyond `import torch`", net, against)
        if arguments.mergekit:
            theirs = mergekit_run(arguments.mergekit, method, paths, arguments.models, work, arguments.threads, 1)
            show(f"mergekit {method} ({theirs.wall / ours.wall:.1f}× the wall time)", theirs, against)


def copy(sources: list[Path], target: Path, *, flush: bool) -> None:
    """Read files in pieces of 1 MiB and write the first one's."""
    with target.open("wb") as out:
        for number, source in enumerate(sources):
            with source.open("rb") as file:
                while piece := file.read(1 << 20):
                    if number == 0:
                        out.write(piece)
        if flush:
            out.flush()
            os.fsync(out.fileno())


def paired(arguments: argparse.Namespace, work: Path) -> None:
    """Print the seconds of copies and merges that took turns, the fastest of several, and their ratios."""
    paths = prepared(work / f"{arguments.size}", arguments.size, arguments.models, False)
    from soups.merging.mergekit import merge_configuration

    def timed(run: Callable[[], object]) -> tuple[float, float]:
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "copy").unlink(missing_ok=True)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - wall, time.process_time() - cpu

    print(
        f"{arguments.models} models of {arguments.size} GB, {arguments.threads} threads, the fastest of {arguments.repeats} turns\n"
    )
    print("| | wall s | CPU s | wall / copy | CPU / copy |\n|---|---|---|---|---|")
    for method in arguments.methods.split(",") if arguments.methods else ("linear", "task_arithmetic"):
        (work / "merge.yml").write_text(configuration(method, paths, arguments.models))
        inputs = [
            path / "model.safetensors" for path in paths[0 if PARAMETERS[method][2] else 1 : arguments.models + 1]
        ]
        runs: dict[str, Callable[[], object]] = {
            f"{method}: copy": lambda inputs=inputs: copy(inputs, work / "copy", flush=False),
            f"{method}: copy, flushed": lambda inputs=inputs: copy(inputs, work / "copy", flush=True),
            f"{method}: merge": lambda: merge_configuration(
                work / "merge.yml", work / "out", threads=arguments.threads
            ),
        }
        turns = [[timed(run) for run in runs.values()] for _ in range(arguments.repeats + 1)][1:]  # the first warms up
        # What disturbs a turn only ever makes it slower.
        fastest = [tuple(map(min, zip(*times, strict=True))) for times in zip(*turns, strict=True)]
        for name, (wall, cpu) in zip(runs, fastest, strict=True):
            print(
                f"| {name} | {wall:.2f} | {cpu:.2f} | {wall / fastest[0][0]:.1f} | {cpu / fastest[0][1]:.1f} |",
                flush=True,
            )


def scaling(arguments: argparse.Namespace, work: Path) -> None:
    """Print time and memory against model size and number of models."""
    method = (arguments.methods or "ties").split(",")[0]
    cases = [(size, 2) for size in (0.25, 0.5, 1, 2, 4)] + [(0.25, models) for models in (4, 8, 16)]
    cases = [(size, models) for size, models in cases if size <= arguments.largest]
    if arguments.prepare:
        for size, models in cases:
            prepared(work / f"{size}", size, models, False)
        return
    print(
        f"soups {method}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n\n| GB a model | models | wall s | CPU s | peak RSS GiB | no mapped file |\n|---|---|---|---|---|---|"
    )
    for size, models in cases:
        paths = prepared(work / f"{size}", size, models, False)
        cost = soups_run(method, paths, models, work, arguments.threads, arguments.repeats)
        print(f"| {size} | {models} | {cost.wall:.2f} | {cost.cpu:.2f} | {cost.rss:.2f} | {cost.own:.2f} |", flush=True)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=0.25, help="GB of one model")
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--methods", default="", help="comma-separated; all when empty")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--mergekit", default="", help="a Python that has mergekit")
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--paired", action="store_true", help="merges and the plain copy by turns in one process")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--largest", type=float, default=math.inf, help="largest model of --scaling")
    parser.add_argument("--prepare", action="store_true", help="only generate the models, in --work")
    parser.add_argument("--work", type=Path, help="where to keep the generated models; a temporary folder otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        (scaling if arguments.scaling else paired if arguments.paired else compare)(arguments, work)


if __name__ == "__main__":
    main()
