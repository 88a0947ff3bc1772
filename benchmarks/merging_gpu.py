"""Merges on a GPU beside the same merges on the CPU.

    python -m benchmarks.merging_gpu --size 1
    python -m benchmarks.merging_gpu --size 1 --methods tsv,iso_c --threads 4
    python -m benchmarks.merging_gpu --svd               (singular values of one matrix: torch's ways, and ours)

Wall seconds of `soups.merging.merge` from files to a file, in one process, after a small merge has started what starts once
(CUDA and its libraries); the best of `--repeats`. Inputs are in the page cache: a base and fine-tunes of it, a Llama's
tensors in bfloat16, drawn on the GPU. The last column is the largest difference between the two results, in units of a tensor's
largest element.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.merging import shapes
from soups.merging import make_method, merge
from soups.merging.methods.svd import svd
from soups.merging.stream import available_cores
from soups.stores import open_store, write_safetensors

EMBEDDINGS = ("*embed*", "lm_head*")
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "karcher": {},
    "task_arithmetic": {},
    "ties.peft": {},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "breadcrumbs": {},
    "tsv": {"exclude": EMBEDDINGS},
    "iso_c": {"exclude": EMBEDDINGS},
    "iso_cts": {"exclude": EMBEDDINGS},
    "knots": {"exclude": EMBEDDINGS},
}
NO_BASE = ("linear", "karcher")


def generate(folder: Path, gigabytes: float, models: int) -> list[Path]:
    """Write a base and fine-tunes of it."""
    wanted, paths = shapes(gigabytes), []
    for number in range(models + 1):
        weights: dict[str, torch.Tensor] = {}
        for place, (name, shape) in enumerate(wanted.items()):
            draw = torch.Generator("cuda").manual_seed(place)
            base = 0.02 * torch.randn(shape, generator=draw, device="cuda")
            draw.manual_seed(1000 * number + place)
            weights[name] = base + (0.002 * torch.randn(shape, generator=draw, device="cuda") if number else 0.0)
        paths.append(folder / f"{number}.safetensors")
        write_safetensors(paths[-1], {name: tensor.bfloat16() for name, tensor in weights.items()})
    return paths


def timed(name: str, paths: list[Path], out: Path, device: str, threads: int, repeats: int) -> float:
    """Return the wall seconds of a merge, the best of several."""
    best = float("inf")
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        base = None if name in NO_BASE else paths[0]
        begin = time.perf_counter()
        method = make_method(name, **METHODS[name])
        merge(method, paths[1:], base=base, out=out, device=device, threads=threads)
        best = min(best, time.perf_counter() - begin)
    return best


def difference(left: Path, right: Path) -> float:
    """Return the largest difference between two files, in units of a tensor's largest element."""
    largest = 0.0
    with open_store(left) as one, open_store(right) as two:
        for key in one:
            a, b = one.read(key).cuda().float(), two.read(key).cuda().float()
            largest = max(largest, float((a - b).abs().max() / b.abs().max()))
    return largest


def decompositions() -> None:
    """Print what a thin SVD of a float32 matrix costs on a GPU, and how far its product is from the matrix."""
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n\n| matrix | way | ms | relative error | orthonormal to |"
    )
    print("|---|---|---|---|---|")
    for shape in ((768, 768), (1024, 1024), (1024, 2816), (4096, 1024)):
        matrix = 0.002 * torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        ways: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
            "torch, its choice": lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=False),
            "torch, gesvd": lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"),
            "here": lambda matrix=matrix: svd(matrix),
        }
        for name, way in ways.items():
            way()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            u, s, vt = way()
            torch.cuda.synchronize()
            taken = time.perf_counter() - begin
            error = float(((u * s) @ vt - matrix).norm() / matrix.norm())
            apart = float((vt @ vt.T - torch.eye(len(vt), device="cuda")).abs().max())
            print(f"| {shape[0]} × {shape[1]} | {name} | {1e3 * taken:.1f} | {error:.1e} | {apart:.1e} |", flush=True)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.25, help="GB of one model")
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--devices", default="cpu,cuda", help="comma-separated")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--svd", action="store_true")
    arguments = parser.parse_args()
    if arguments.svd:
        decompositions()
        return
    devices = arguments.devices.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "small").mkdir()
        small = generate(work / "small", 0.02, 2)
        paths = generate(work, arguments.size, arguments.models)
        size = paths[0].stat().st_size / 1e9
        print(
            f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {arguments.threads} threads; {arguments.models} models "
            f"and a base of {size:.2f} GB, bfloat16; wall seconds, best of {arguments.repeats}\n"
        )
        print(f"| method | {' | '.join(devices)} | largest difference |\n|---|{'---|' * len(devices)}---|")
        for name in arguments.methods.split(","):
            outs = [work / f"{device}.safetensors" for device in devices]
            found: list[str] = []
            for device, out in zip(devices, outs, strict=True):
                warm = work / "small" / "out.safetensors"
                timed(name, small, warm, device, arguments.threads, 1)
                found.append(f"{timed(name, paths, out, device, arguments.threads, arguments.repeats):.2f}")
            apart = f"{difference(*outs):.1e}" if len(outs) == 2 else ""
            print(f"| {name} | {' | '.join(found)} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
