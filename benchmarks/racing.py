"""How much of a greedy search can be left out, and do batches of candidates pay?

    python -m benchmarks.racing                     a minute on one core: small networks on scikit-learn's digits
    python -m benchmarks.racing --pool PATH         a pool of ingredients made by train.py; about two searches' time

For each way to race: the share of all evaluations (candidates × held-out samples) left out, wall time over that of full
evaluation within the same run, and whether the soup is the one of full evaluation. Then: time of M models' predictions in
one pass (torch.func.vmap) over one after the other, for a convolutional network, a transformer and a perceptron.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from soups.evaluation import predict
from soups.evaluation.batched import predict_many
from soups.evaluation.scores import Batch
from soups.evaluation.statistics import losses, right
from soups.recipes import Candidate, Soup, greedy
from soups.recipes.racing import Race, hardest_first, in_order, network_samples, random_order, saving
from soups.seeding import generator

BLOCK = 64


@dataclass(frozen=True)
class Task:
    """A network, its held-out split, and ingredients."""

    name: str
    module: nn.Module
    batches: list[Batch]
    loads: Mapping[str, Callable[[], Mapping[str, Tensor]]]


def digits(models: int = 32) -> Task:
    """Perceptrons on scikit-learn's digits: a shared start, then fine-tunes that differ in rate, length and noise."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    order = random_order(len(labels), 0)
    train, held = order[:597], order[597:]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def fit(seed: int, rate: float, epochs: int, noise: float) -> dict[str, Tensor]:
        source = generator(seed, "digits")
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        for _ in range(epochs):
            for part in train[torch.randperm(len(train), generator=source)].split(32):
                inputs = images[part] + noise * torch.randn(len(part), 64, generator=source)
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs), labels[part]).backward()
                optimizer.step()
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    start = fit(-1, 1e-3, 6, 0.0)
    fitted: dict[str, dict[str, Tensor]] = {}
    for number in range(models):
        module.load_state_dict(start)
        draw = torch.rand(3, generator=generator(number, "settings")).tolist()
        fitted[f"m{number}"] = fit(number, 10 ** (-3.5 + 1.5 * draw[0]), 4 + int(12 * draw[1]), 0.3 * draw[2])
    batches: list[Batch] = [(images[part], labels[part]) for part in held.split(BLOCK)]
    return Task(f"perceptrons on digits, {models} candidates, {len(held)} held-out samples", module, batches,
                {name: lambda weights=weights: weights for name, weights in fitted.items()})  # fmt: skip


def from_pool(path: Path) -> Task:
    """The ingredients of a pool with the network and held-out split of their settings."""
    from soups.fitting.configuration import read_configuration
    from soups.fitting.run import run_of
    from soups.fitting.task import evaluation_batches
    from soups.stores.pool import Pool

    pool = Pool(path)
    records = sorted(pool.ingredients(), key=lambda record: record.fingerprint)
    if not records:
        raise SystemExit(f"{path} holds no ingredients; make some with train.py.")
    run = run_of(read_configuration(records[0].config))
    splits, network, loader = run.splits, run.network, run.layout.loader
    return Task(
        f"{run.asked.model['name']}, {len(records)} candidates, {len(splits.heldout)} held-out samples",
        network.module,
        evaluation_batches(splits.heldout, network, run.asked.loader.size, loader),
        {record.short: lambda name=record.fingerprint: pool.weights(name) for record in records},
    )


def race(task: Task) -> None:
    """Search with full evaluation and with each way to race."""
    labels = torch.cat([labels for _, labels in task.batches])
    logits: list[Tensor] = []
    for load in task.loads.values():
        task.module.load_state_dict(load())
        logits.append(predict(task.module, task.batches))
    correct = torch.stack([right(values, labels) for values in logits]).double()
    negative = torch.stack([-losses(values, labels) for values in logits])
    print(task.name)
    for metric, own, ceiling in (("accuracy", correct, 1.0), ("loss", negative, 0.0)):
        pool = [Candidate(n, float(own[k].mean()), load) for k, (n, load) in enumerate(task.loads.items())]
        orders = {"random": random_order(len(labels), 0), "hardest first": hardest_first(negative)}
        batches = {name: in_order(task.batches, order, BLOCK) for name, order in orders.items()}

        def search(order: str, delta: float, full: bool = False) -> tuple[Soup, float]:
            blocks = network_samples(task.module, batches[order], metric)  # noqa: B023
            judge = Race(blocks, ceiling, delta, len(pool))  # noqa: B023
            began = time.perf_counter()
            soup = greedy(pool, judge.__call__ if full else judge)  # noqa: B023
            return soup, time.perf_counter() - began

        whole, seconds = search("random", 0.0, full=True)
        print(f"  by {metric}: full evaluation keeps {len(whole.members)} of {len(pool)}, {seconds:.2f} s")
        for label, order, delta in (
            ("exact, random order", "random", 0.0),
            ("exact, hardest first", "hardest first", 0.0),
            ("by confidence, delta 0.05", "random", 0.05),
            ("by confidence, delta 0.20", "random", 0.20),
        ):
            soup, took = search(order, delta)
            same = "the same soup" if soup.members == whole.members else "ANOTHER soup"
            rejected = [step.evaluated for step in soup.steps if not step.kept]
            mean = sum(rejected) / len(rejected) if rejected else 1.0
            print(
                f"    {label:26} left out {saving(soup.steps):6.1%}, a rejected candidate saw {mean:6.1%} of the split, "
                f"time {took / seconds:.2f} of full, {same}"
            )


def batches_of_candidates(models: int = 8) -> None:
    """Time of several models' predictions in one pass over one after the other."""
    import timm

    print(f"{models} models in one pass (vmap) over one after the other, {torch.get_num_threads()} thread(s):")
    source = torch.Generator().manual_seed(0)
    shapes: Sequence[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
        ("perceptron 64-128-128-10, batch 64",
         lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)), (64, 64)),
        ("tf_efficientnet_lite0 at 96 pixels, batch 64",
         lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10), (64, 3, 96, 96)),
        ("test_vit at 160 pixels, batch 64", lambda: timm.create_model("test_vit", num_classes=10), (64, 3, 160, 160)),
    ]  # fmt: skip
    for name, build, shape in shapes:
        module = build()
        inputs = torch.randn(shape, generator=source)
        batches: list[Batch] = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
        several = [{k: v.clone() for k, v in module.state_dict().items()} for _ in range(models)]

        def one_by_one() -> None:
            for weights in several:  # noqa: B023
                module.load_state_dict(weights)  # noqa: B023
                predict(module, batches)  # noqa: B023

        singly = _best(one_by_one)
        together = _best(lambda: predict_many(module, several, batches))  # noqa: B023
        print(f"  {name:46} {together / singly:5.2f}   ({1000 * singly:.0f} ms one after the other)")


def _best(function: Callable[[], object], repeats: int = 5) -> float:
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, help="a folder of ingredients, as in pool.path")
    place = parser.parse_args().pool
    race(from_pool(place) if place else digits())
    if not place:
        batches_of_candidates()


if __name__ == "__main__":
    main()
