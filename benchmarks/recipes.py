"""What does choosing a soup cost over evaluating its ingredients, and what does a learned soup need in memory?

    python -m benchmarks.recipes               about 12 minutes on one core
    python -m benchmarks.recipes --quick       smaller, to see that it runs

Prints ratios, each measured within this one run:
- greedy over 32 ingredients: its time over that of 32 evaluations of one model; the rest is reading and averaging;
- the same with a candidate dropped once it cannot be kept (exact racing), and by confidence;
- greedy, uniform and learned for 8, 16, 32 and 64 ingredients: time, and memory beside the network and the data;
- the learned soup's peak memory and time against all models in memory and autograd through the mixture, as in the
  authors' code.

The network is EfficientNet-Lite0 at 56 pixels with random weights on random images, and for memory a perceptron whose
weights are larger than its activations. Ingredients are safetensors files in the page cache. One thread. Every memory is
the peak of a process of its own over what was resident before the recipe; Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from soups.evaluation import HeldoutGradient, predict, score
from soups.evaluation.statistics import losses
from soups.recipes import Candidate, greedy, learned, uniform
from soups.recipes.racing import Race, hardest_first, in_order, network_samples, random_order, saving
from soups.seeding import generator
from soups.stores import SafetensorsStore, read_safetensors, write_safetensors
from soups.weights import Weights

Batches = list[tuple[Tensor, Tensor]]


def resident(key: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) / 1024


def alone(work: Callable[[], Any]) -> dict[str, Any]:
    """Run something in a forked process; return what it returns, its seconds and its peak memory in MiB."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")
        before, began = resident("VmRSS"), time.perf_counter()
        value = work()
        theirs.send({"value": value, "seconds": time.perf_counter() - began, "peak": resident("VmHWM") - before})

    process = context.Process(target=child)
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


class Perceptron(nn.Sequential):
    """Three square matrices: many weights, few activations."""

    def __init__(self, width: int) -> None:
        hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
        super().__init__(nn.Linear(256, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def ingredients(module: nn.Module, folder: Path, count: int) -> list[Path]:
    """Write `count` models near `module`; return their files."""
    folder.mkdir()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    files = []
    for number in range(count):
        source = torch.Generator().manual_seed(number)
        near = {
            name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=source)
            if tensor.is_floating_point() and "running" not in name and tensor.ndim > 1
            else tensor
            for name, tensor in start.items()
        }
        files.append(folder / f"{number:02}.safetensors")
        write_safetensors(files[-1], near)
    return files


def teacher_labels(module: nn.Module, batches: list[Tensor], noise: float) -> Batches:
    """Label inputs by the network itself, a share of them at random, so that models near it score alike."""
    source = torch.Generator().manual_seed(0)
    found = []
    for inputs in batches:
        with torch.inference_mode():
            labels = module.eval()(inputs).argmax(1)
        wrong = torch.rand(len(labels), generator=source) < noise
        found.append((inputs, torch.where(wrong, torch.randint(10, (len(labels),), generator=source), labels)))
    return found


def candidates_of(files: list[Path], own: list[float]) -> list[Candidate]:
    return [
        Candidate(file.stem, value, lambda f=file: read_safetensors(f), lambda f=file: SafetensorsStore(f))
        for file, value in zip(files, own, strict=True)
    ]


def accuracy_of(module: nn.Module, batches: Batches) -> Callable[[Weights], float]:
    labels = torch.cat([labels for _, labels in batches])

    def accuracy(weights: Weights) -> float:
        module.load_state_dict(weights)
        return score(predict(module, batches), labels).accuracy

    return accuracy


def greedy_costs(folder: Path, quick: bool) -> None:
    import timm

    models, count = (8, 250) if quick else (32, 1000)
    torch.manual_seed(0)
    module = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    module.to(memory_format=torch.channels_last)
    inputs = [torch.randn(250, 3, 56, 56).contiguous(memory_format=torch.channels_last) for _ in range(count // 250)]
    batches = teacher_labels(module, inputs, 0.2)
    accuracy = accuracy_of(module, batches)
    files = ingredients(module, folder / "efficientnet", models)
    own = [accuracy(read_safetensors(file)) for file in files]
    weights = read_safetensors(files[0])
    accuracy(weights)
    began = time.perf_counter()
    for _ in range(models):
        accuracy(weights)
    evaluations = time.perf_counter() - began
    pool = candidates_of(files, own)
    began = time.perf_counter()
    soup = greedy(pool, accuracy)
    full = time.perf_counter() - began
    print(
        f"{models} evaluations of one model: {evaluations:.1f} s; greedy over {models}: {full:.1f} s, ratio {full / evaluations:.3f}"
    )
    print(f"  it kept {len(soup.members)} of {models}")

    labels = torch.cat([labels for _, labels in batches])
    table = []
    for file in files:
        module.load_state_dict(read_safetensors(file))
        table.append(-losses(predict(module, batches), labels))
    orders = {"exact": hardest_first(torch.stack(table)), "delta = 0.05": random_order(count, 0)}
    for (name, order), delta in zip(orders.items(), (0.0, 0.05), strict=True):
        race = Race(network_samples(module, in_order(batches, order, 64), "accuracy"), 1.0, delta, models)
        began = time.perf_counter()
        raced = greedy(pool, race)
        seconds = time.perf_counter() - began
        same = "the same soup" if raced.members == soup.members else "another soup"
        print(
            f"  racing, {name}: {seconds:.1f} s, {seconds / full:.2f} of the full search; samples saved "
            f"{saving(raced.steps):.0%}; {same}"
        )
    print(f"{'ingredients':>12} {'recipe':>8} {'seconds':>8} {'per ingredient':>15} {'peak, MiB':>10}")
    for number in (2, 4, 8) if quick else (8, 16, 32, 64):
        if number > len(files):
            files += ingredients(module, folder / f"more-{number}", number - len(files))
            own += [accuracy(read_safetensors(file)) for file in files[len(own) :]]
        some = candidates_of(files[:number], own[:number])
        recipes: dict[str, Callable[[], Any]] = {
            "uniform": lambda some=some: len(uniform(some, accuracy).members),
            "greedy": lambda some=some: len(greedy(some, accuracy).members),
            "learned": lambda some=some: len(
                learned(some, accuracy, HeldoutGradient(module, batches), epochs=1).members
            ),
        }
        for name, work in recipes.items():
            cost = alone(work)
            print(
                f"{number:>12} {name:>8} {cost['seconds']:>8.1f} {cost['seconds'] / number:>15.2f} {cost['peak']:>10.0f}",
                flush=True,
            )


def all_in_memory(module: nn.Module, files: list[Path], batches: Batches, epochs: int) -> list[float]:
    """Learn the shares the authors' way; return them."""
    models = [read_safetensors(file) for file in files]
    logits = torch.zeros(len(models), requires_grad=True)
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([logits, beta], lr=0.05, weight_decay=0.0)
    for epoch in range(epochs):
        for number in torch.randperm(len(batches), generator=generator(0, "learned", epoch)).tolist():
            inputs, labels = batches[number]
            shares = logits.softmax(0)
            mixed = {
                name: sum(share * model[name] for share, model in zip(shares, models, strict=True))
                for name in models[0]
            }
            optimizer.zero_grad()
            functional.cross_entropy(beta * functional_call(module, mixed, (inputs,)), labels).backward()
            optimizer.step()
    return logits.softmax(0).tolist()


def learned_memory(folder: Path, quick: bool) -> None:
    width, counts = (512, (4, 8)) if quick else (2048, (8, 16, 32))
    torch.manual_seed(0)
    module = Perceptron(width).eval()
    batches = teacher_labels(module, [torch.randn(64, 256) for _ in range(4)], 0.2)
    size = sum(tensor.numel() * 4 for tensor in module.state_dict().values()) / 2**20
    files = ingredients(module, folder / "perceptron", max(counts))
    accuracy, gradient = accuracy_of(module, batches), HeldoutGradient(module, batches)
    # What a first optimiser loads once is no memory of either. (No backward pass here: autograd does not survive a fork.)
    share = torch.zeros(1, requires_grad=True)
    share.grad = torch.zeros(1)
    torch.optim.AdamW([share]).step()
    print(f"learned soup of perceptrons of {size:.0f} MiB, 2 epochs of 4 steps:")
    for number in counts:
        some = candidates_of(files[:number], [0.0] * number)

        def streamed(some: list[Candidate] = some) -> list[float]:
            soup = learned(some, accuracy, gradient, epochs=2)
            return [soup.coefficients[candidate.name] for candidate in some]

        ours = alone(streamed)
        theirs = alone(lambda number=number: all_in_memory(module, files[:number], batches, 2))
        far = max(abs(a - b) for a, b in zip(ours["value"], theirs["value"], strict=True))
        print(
            f"  {number:>2} ingredients: streamed {ours['peak']:.0f} MiB ({ours['peak'] / size:.1f} models), "
            f"{ours['seconds']:.1f} s; in memory {theirs['peak']:.0f} MiB ({theirs['peak'] / size:.1f} models), "
            f"{theirs['seconds']:.1f} s; ratio of memory {ours['peak'] / theirs['peak']:.2f}; shares differ by {far:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        learned_memory(Path(scratch), arguments.quick)
        greedy_costs(Path(scratch), arguments.quick)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
