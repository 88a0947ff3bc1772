"""Four fine-tunes of MiniLM on four text tasks, merged into one encoder by each method, evaluated on every task.

    python -m experiments.multi_task_merging.run        (about 7 minutes a seed on one CPU thread; adds to results.csv)
    python -m experiments.multi_task_merging.table      (prints the table of README.md)

Each task has its linear probe as a head that stays fixed, so what fine-tuning learns is in the encoder, and any encoder can
be used with any head. λ of each method is the best of three on the held-out splits (mean accuracy over tasks); the test
splits are looked at once, with the λ that was chosen.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from soups.evaluation import Batch, forward, predict
from soups.merging import make_method, merge
from soups.seeding import derive_seed
from soups.stores import open_store, write_safetensors
from soups.tasks.data import ShuffledBatches, Splits
from soups.tasks.network import Network
from soups.tasks.news import news
from soups.tasks.probe import linear_probe
from soups.tasks.rated_texts import sentiment
from soups.tasks.text_models import huggingface_text
from soups.tasks.texts import Texts

HERE = Path(__file__).parent
TASKS = ("news", "movies", "amazon", "tweets")
TRAIN, HELDOUT, TEST, TOKENS = 800, 100, 250, 40
RATE, BATCH = 2e-4, 16
HEAD = "classifier."

# Method, its parameters at λ = 1, and the values of λ to choose from; θ = θ_0 + λ · (merged − θ_0).
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "average": ("linear", {}, (1.0,)),
    "task arithmetic": ("task_arithmetic", {"scale": 1.0}, (0.3, 0.5, 0.8)),
    "TIES": ("ties", {"density": 0.2}, (0.5, 1.0, 1.5)),
    "DARE-TIES": ("dare_ties", {"density": 0.5}, (0.5, 1.0, 1.5)),
    "Breadcrumbs": ("breadcrumbs", {"scale": 1.0}, (0.3, 0.5, 0.8)),
    "TSV-M": ("tsv", {"exclude": ("*embeddings*",)}, (0.5, 1.0, 1.5)),
    "Iso-C": ("iso_c", {"exclude": ("*embeddings*",)}, (0.5, 1.0, 1.5)),
}


@dataclass
class Task:
    """A task: its network (the encoder is shared by copying weights), its splits as batches, and its head."""

    splits: Splits
    network: Network
    head: dict[str, Tensor]
    heldout: list[Batch]
    test: list[Batch]


def splits_of(name: str, seed: int, sizes: tuple[int, int, int]) -> Splits:
    train, heldout, test = sizes
    if name == "news":
        return news(train, heldout, test, split_seed=seed)
    return sentiment(name, train, heldout, test, ood=(), split_seed=seed)


def batches(network: Network, samples: Texts) -> list[Batch]:
    data = network.input.dataset(samples, TOKENS)
    return [data[[(0, i) for i in range(at, min(at + 50, len(samples)))]] for at in range(0, len(samples), 50)]


def prepare(name: str, seed: int, sizes: tuple[int, int, int]) -> Task:
    splits = splits_of(name, seed, sizes)
    torch.manual_seed(derive_seed(seed, name))
    network = huggingface_text("all-MiniLM-L6-v2", len(splits.classes), pooling="mean")
    heldout, test = batches(network, splits.heldout), batches(network, splits.test)
    linear_probe(network, batches(network, splits.train.by_length()), heldout, len(splits.classes))
    state = network.module.state_dict()
    head = {key: value.clone() for key, value in state.items() if key.startswith(HEAD)}
    return Task(splits, network, head, heldout, test)


def encoder(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if not key.startswith(HEAD)}


def fine_tune(task: Task, seed: int, epochs: int) -> dict[str, Tensor]:
    """Train the encoder under the fixed head: AdamW, linear warm-up over a tenth of the steps, linear decay."""
    module = task.network.module
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not key.startswith(HEAD))
    data = task.network.input.dataset(task.splits.train, TOKENS)
    order = ShuffledBatches(len(task.splits.train), BATCH, seed)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01)
    steps = epochs * len(order)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    module.train()
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for keys in order:
            inputs, labels = data[keys]
            cross_entropy(forward(module, inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return encoder(module)


def accuracies(tasks: Mapping[str, Task], weights: Mapping[str, Tensor], split: str) -> dict[str, float]:
    """Return the accuracy of an encoder on every task, with the task's head."""
    result: dict[str, float] = {}
    for name, task in tasks.items():
        task.network.module.load_state_dict({**weights, **task.head})
        logits = predict(task.network.module, getattr(task, split))
        labels = torch.cat([labels for _, labels in getattr(task, split)])
        result[name] = float((logits.argmax(1) == labels).double().mean())
    return result


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def one_seed(seed: int, write: Any, sizes: tuple[int, int, int], epochs: int, methods: list[str]) -> None:
    begun = time.process_time()

    def tell(what: str) -> None:
        print(f"seed {seed}: {what}, {time.process_time() - begun:.0f} CPU-s", file=sys.stderr, flush=True)

    tasks = {name: prepare(name, seed, sizes) for name in TASKS}
    start = encoder(tasks["news"].network.module)
    with tempfile.TemporaryDirectory() as scratch:
        base, paths = Path(scratch) / "base.safetensors", [Path(scratch) / f"{name}.safetensors" for name in TASKS]
        write_safetensors(base, start)
        for name, path in zip(TASKS, paths, strict=True):
            write_safetensors(path, fine_tune(tasks[name], seed, epochs))
            tell(f"fine-tuned {name}")
        write("pretrained", "", accuracies(tasks, start, "test"))
        for name, path in zip(TASKS, paths, strict=True):
            with open_store(path) as store:
                write(f"expert: {name}", "", accuracies(tasks, store.load(), "test"))
        tell("evaluated the experts")
        for label in methods:
            name, parameters, scales = METHODS[label]
            method = make_method(name, **parameters, **({"seed": seed} if name.startswith("dare") else {}))
            at_one = merge(method, paths, base=None if name == "linear" else base)

            def at(scale: float, end: Any = at_one) -> dict[str, Tensor]:
                return {
                    key: torch.lerp(start[key], value, scale) if value.is_floating_point() else value
                    for key, value in end.items()
                }

            scores = (
                {scale: mean(accuracies(tasks, at(scale), "heldout")) for scale in scales} if len(scales) > 1 else {}
            )
            best = max(scores, key=lambda scale: scores[scale]) if scores else scales[0]
            write(label, best, accuracies(tasks, at(best), "test"))
            tell(f"{label}: λ = {best}")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--sizes", type=int, nargs=3, default=(TRAIN, HELDOUT, TEST), help="train, held-out, test")
    arguments.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments.add_argument("--out", type=Path, default=HERE / "results.csv")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["seed", "model", "lambda", *TASKS])
        for seed in options.seeds:

            def write(model: str, scale: Any, values: Mapping[str, float], seed: int = seed) -> None:
                writer.writerow([seed, model, scale, *(f"{values[name]:.4f}" for name in TASKS)])
                file.flush()

            one_seed(seed, write, tuple(options.sizes), options.epochs, options.methods)


if __name__ == "__main__":
    main()
