"""What does averaging cost? Time of an update over the floor, beside other libraries, for three vision transformers.

    python -m benchmarks.averaging                      (about 5 minutes; prints a table)
    python -m benchmarks.averaging --models vit_tiny_patch16_224 --rounds 5
    python -m benchmarks.averaging --ours               (without the other libraries)
    python -m benchmarks.averaging --step               (whole training steps of a small ViT, with and without)
    python -m benchmarks.averaging --memory             (peak memory beside the weights)
    python -m benchmarks.averaging --device cuda [--step]        (the same on a GPU)

The floor is the least an in-place average can cost: 12 bytes a parameter (read the average and the weight, write the average)
at the bandwidth of a `lerp_` over a hundred million elements, measured in the same rounds. All contestants are timed in turn,
round by round, with the caches emptied before each; a row gives the median of the per-round ratios to the floor, and the ratio
of the minima, which a busy machine disturbs less. With one thread the clock is the process's own CPU time, with more, and on a
GPU, it is the wall's. The largest model needs 13 GB of memory.

On a GPU a round is a number of updates, or of training steps (vit_base at 224 px, 64 images, bfloat16 autocast), between two
waits for the device, as in a training loop, which does not wait.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from soups.averaging import EMA, LAWA, SWA, PowerEMA, release, update
from soups.averaging.swapping import Swap

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
FLOOR_ELEMENTS = 100_000_000
# Calls between two waits for a GPU.
QUEUED = 20


def contestants(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return one call for each way of updating an average of `model`'s parameters."""
    weights = dict(model.named_parameters())
    parameters = sum(tensor.numel() for tensor in weights.values())
    calls: dict[str, Callable[[], Any]] = {}

    def ours(name: str, averages: list[Any], warm: int = 2) -> None:
        for _ in range(warm):
            update(averages, weights)
        calls[name] = lambda: update(averages, weights)

    ours("soups EMA", [EMA(0.999)])
    ours("soups 2 EMAs", [EMA(0.999), EMA(0.9999)])
    ours("soups 4 averages", [EMA(0.999), SWA(), PowerEMA(0.05), PowerEMA(0.1)])
    if on_gpu(model):
        ours("soups EMA in bfloat16", [EMA(0.999, dtype="bfloat16")])
    else:
        ours("soups EMA, fused", [EMA(0.999, fused=True)])
        ours("soups 2 EMAs, fused", [EMA(0.999, fused=True), EMA(0.9999, fused=True)])
        fused = [EMA(0.999, fused=True), EMA(0.9999, fused=True), PowerEMA(0.05, fused=True), PowerEMA(0.1, fused=True)]
        ours("soups 4 averages, fused", fused)
        calls["bound of 4: a cached chunk into 4"] = bound(parameters, 4)
    for k in (10, 3) if parameters < 50e6 else (10,):  # to spare the memory
        ours(f"soups LAWA(k={k})", [LAWA(k)], warm=k + 1)
    value = EMA(0.999)
    value.update(weights)
    held = value.value()

    exchange = Swap(dict(weights))

    def swap() -> None:
        exchange.enter(held)
        exchange.exit()

    calls["soups swap in and out"] = swap
    return calls


def on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def bound(parameters: int, count: int) -> Callable[[], Any]:
    """Return the least that `count` averages can cost with `lerp_`: one comes with the weights, the rest find them cached."""
    size = 1 << 17
    chunk = torch.ones(size)
    averages = [torch.zeros(parameters // size * size).split(size) for _ in range(count)]
    weights = torch.ones(parameters // size * size).split(size)

    def call() -> None:
        for number, weight in enumerate(weights):
            averages[0][number].lerp_(weight, 0.1)
            for average in averages[1:]:
                average[number].lerp_(chunk, 0.1)

    return call


def peers(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return the same for other libraries; those that are not installed are left out."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    calls: dict[str, Callable[[], Any]] = {}
    multi = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    calls["torch AveragedModel, multi_avg_fn"] = lambda: multi.update_parameters(model)
    single = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999))
    calls["torch AveragedModel, avg_fn"] = lambda: single.update_parameters(model)
    v3 = ModelEmaV3(model, decay=0.999)
    calls["timm ModelEmaV3"] = lambda: v3.update(model)
    try:
        from ema_pytorch import EMA as Theirs

        lucid = Theirs(model, beta=0.999, update_every=1, update_after_step=0)
        lucid.update()
        calls["ema-pytorch"] = lucid.update
    except ImportError:
        print("ema-pytorch is not installed (in a clone: pip install -e '.[peers]'): left out", file=sys.stderr)
    module = LightningModule()
    module.model = model
    module.to(
        next(model.parameters()).device
    )  # Lightning makes its copy on the device that it believes the module to be on
    callback = EMAWeightAveraging(decay=0.999)

    class Trainer:
        global_step = 0

    callback.setup(Trainer(), module, "fit")  # type: ignore[arg-type]

    def lightning() -> None:
        Trainer.global_step += 1
        callback.on_train_batch_end(Trainer(), module, None, None, 0)  # type: ignore[arg-type]

    calls["Lightning EMAWeightAveraging"] = lightning

    def swap() -> None:
        callback.on_validation_epoch_start(Trainer(), module)  # type: ignore[arg-type]
        callback.on_validation_epoch_end(Trainer(), module)  # type: ignore[arg-type]

    calls["Lightning swap in and out"] = swap
    for call in calls.values():
        call()
    return calls


def waiting() -> float:
    """Return the wall's time after the GPU has done what was asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    model_name: str, rounds: int, clock: Callable[[], float], *, ours: bool = False, device: str = "cpu"
) -> None:
    model = timm.create_model(model_name).to(device)
    repeats = QUEUED if on_gpu(model) else 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    long = torch.zeros(FLOOR_ELEMENTS, device=device), torch.ones(FLOOR_ELEMENTS, device=device)
    calls = {"floor": lambda: long[0].lerp_(long[1], 0.1), **contestants(model), **({} if ours else peers(model))}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            long[0].add_(1)  # empties the caches of what is measured
            gc.collect()
            begin = clock()
            for _ in range(repeats):
                call()
            times[name].append((clock() - begin) / repeats)
    share = parameters / FLOOR_ELEMENTS
    floor = [t * share for t in times.pop("floor")]
    print(f"\n{model_name}: {parameters / 1e6:.1f} M parameters, floor {1e3 * statistics.median(floor):.3f} ms")
    print(f"  {'':36}{'median':>8}{'minima':>8}{'x one EMA':>12}{'minima':>8}")
    one = times["soups EMA"]
    for name, taken in times.items():
        ratio = statistics.median(t / f for t, f in zip(taken, floor, strict=True))
        of_one = statistics.median(t / o for t, o in zip(taken, one, strict=True))
        print(f"  {name:36}{ratio:8.2f}{min(taken) / min(floor):8.2f}{of_one:12.2f}{min(taken) / min(one):8.2f}")


def training_step(rounds: int, clock: Callable[[], float], device: str) -> None:
    """Time whole training steps of a ViT with nothing, with our averages, with torch's, Lightning's and timm's."""
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    gpu = device != "cpu"
    name, side, count = ("vit_base_patch16_224", 224, 64) if gpu else ("vit_tiny_patch16_224", 64, 16)
    model = timm.create_model(name, img_size=side, num_classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    images, labels = torch.randn(count, 3, side, side, device=device), torch.randint(10, (count,), device=device)
    weights = dict(model.named_parameters())
    theirs, timms = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999)), ModelEmaV3(model, decay=0.999)
    after: dict[str, Callable[[], Any]] = {"without averaging": lambda: None}
    before: dict[str, Callable[[], Any]] = {}

    def ours(row: str, *averages: Any) -> None:
        after[row] = lambda: update(averages, weights, released=False)
        before[row] = lambda: release(averages)

    ours("soups EMA", EMA(0.999))
    ours("soups 4 averages", EMA(0.999), SWA(), PowerEMA(0.05), PowerEMA(0.1))
    after["timm ModelEmaV3"] = lambda: timms.update(model)
    after["Lightning's (AveragedModel, avg_fn)"] = lambda: theirs.update_parameters(model)
    if gpu:
        multi = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        after["torch AveragedModel, multi_avg_fn"] = lambda: multi.update_parameters(model)
        ours("soups EMA on the CPU", EMA(0.999, device="cpu"))
        ours("soups EMA on the CPU, waited for", EMA(0.999, device="cpu", background=False))
        host = ModelEmaV3(model, decay=0.999, device="cpu")
        after["timm ModelEmaV3 on the CPU"] = lambda: host.update(model)

    def step(row: str) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        before.get(row, lambda: None)()
        optimizer.step()
        after[row]()

    times: dict[str, list[float]] = {row: [] for row in after}
    repeats = QUEUED if gpu else 1
    for _ in range(rounds + 2):
        for row in after:
            begin = clock()
            for _ in range(repeats):
                step(row)
            times[row].append((clock() - begin) / repeats)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"\ntraining step: {name} at {side} px ({size:.1f} M parameters), {count} images, AdamW(foreach)")
    base = times["without averaging"][2:]
    for row, taken in times.items():
        ratio = statistics.median(t / b for t, b in zip(taken[2:], base, strict=True))
        print(f"  {row:36}{1e3 * statistics.median(taken[2:]):8.1f} ms   x{ratio:.3f}")


def memory() -> None:
    """Report peak memory of averages beside the weights, each in a process of its own (Linux)."""
    print("\npeak memory of six updates beside the weights, in copies of them (40 M parameters, float32)")
    for name, made in (
        ("one EMA", "[EMA(0.9)]"),
        ("3 averages", "[EMA(0.9), SWA(), PowerEMA(0.1)]"),
        ("LAWA(k=3): mean and 3 snapshots", "[LAWA(3)]"),
        ("one EMA in the background", "[EMA(0.9, background=True)]"),
    ):
        program = (
            "import pathlib, re, torch; from soups.averaging import *;"
            "w = {str(i): torch.ones(10_000_000) for i in range(4)};"
            f"a = {made};"
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]);"
            "pathlib.Path('/proc/self/clear_refs').write_text('5');"  # the peak starts anew at what is held now
            "before = peak();"
            "[update(a, w) for _ in range(6)];"
            "[average.value() for average in a];"
            "print(peak() - before)"
        )
        grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        print(f"  {name:36}{grown * 1024 / 160e6:8.2f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="*", default=list(MODELS))
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--ours", action="store_true", help="leave the other libraries out")
    arguments.add_argument("--step", action="store_true")
    arguments.add_argument("--memory", action="store_true")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    clock = waiting if gpu else time.process_time if options.threads == 1 else time.perf_counter
    where = f", {torch.cuda.get_device_name()}" if gpu else ""
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds{where}")
    if options.step or options.memory:
        if options.step:
            training_step(options.rounds, clock, options.device)
        if options.memory:
            memory()
        return
    for name in options.models:
        measure(name, options.rounds, clock, ours=options.ours, device=options.device)


if __name__ == "__main__":
    main()
