"""What recipes work with, built from settings: candidates, held-out scores, predictions and gradients of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from soups.averaging.batchnorm import batch_norms, reestimate, statistics
from soups.errors import ConfigError
from soups.evaluation import HeldoutGradient, Score, diagonal_fisher, forward, predict, score
from soups.evaluation.scores import Batch, ranks
from soups.evaluation.statistics import losses, right
from soups.launch.members import Origin, empty_network
from soups.launch.settings import Settings, build_splits
from soups.launch.start import evaluation_batches
from soups.recipes import RECIPES, Candidate, Soup, Step, is_required, needs_of, options_of
from soups.recipes.racing import Race, hardest_first, in_order, network_samples, random_order
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool
from soups.tasks.data import ShuffledBatches, Splits
from soups.weights import Weights, hash_weights

# What `soup.batchnorm` may say: an average's statistics are averages too, or measured on training data.
AVERAGE, REESTIMATE = "average", "reestimate"
# Training batches for that, where the settings name no number.
BATCHES = 32
# Samples a backward pass each that the Fisher information is estimated on.
_FISHER_SAMPLES = 256
# Held-out samples of a race that are evaluated at once: fewer decide earlier, more compute faster.
_RACE_BLOCK = 64


class Kitchen:
    """A network, the splits and the pool, with predictions that are made once and kept in the pool.

    Args:
        settings: the resolved configuration.
        pool: of the ingredients.
        device: for the network.
        writes: keep predictions in the pool; one rank of several does.

    Attributes:
        evaluations: of the network on a split, so far.
        asked: held-out scores that recipes asked for, so far; one that is known already counts.
        latest_samples: per-sample scores behind the latest of them, (N,).
    """

    def __init__(self, settings: Settings, pool: Pool | CheckpointPool, device: torch.device, writes: bool) -> None:
        self.settings, self.pool, self.device, self.writes = settings, pool, device, writes
        self.splits: Splits = build_splits(settings)
        self.network = empty_network(settings, self.splits)
        self.network.module.to(device)
        self.on_score: Callable[[], None] = lambda: None
        self.evaluations = self.asked = 0
        self.latest_samples = torch.empty(0)
        self._batches: dict[str, list[Batch]] = {}
        self._digests: dict[str, str] = {}
        self._known: dict[str, tuple[float, Tensor]] = {}
        self._latest: tuple[str, Tensor] | None = None
        # Hashes of models whose BatchNorm statistics are their own, and measured statistics by the hash of an average.
        self._own: set[str] = set()
        self._statistics: dict[str, dict[str, Tensor]] = {}
        self._training_batches: list[Batch] = []

    @property
    def metric(self) -> str:
        """The held-out metric that selects."""
        return str(self.settings["soup"]["metric"])

    @property
    def sign(self) -> float:
        """What makes larger better: 1 for an accuracy, -1 for a loss."""
        return 1.0 if self.metric == "accuracy" else -1.0

    def logits(self, weights: Weights, split: str, weights_hash: str | None = None) -> Tensor:
        """Return logits (N, classes) of some weights on a split; stored in the pool when their hash is given."""
        samples = {"heldout": self.splits.heldout, **self.splits.reported()}[split]
        if weights_hash and (stored := self.pool.predictions(weights_hash, self.digest(split))) is not None:
            return stored
        if split not in self._batches:
            self._batches = {key: value for key, value in self._batches.items() if key == "heldout"}
            self._batches[split] = evaluation_batches(self.settings, samples, self.network)
        self.network.module.load_state_dict(weights)
        logits = predict(self.network.module, self._batches[split], self.device)
        self.evaluations += 1
        if weights_hash and self.writes:
            self.pool.add_predictions(weights_hash, self.digest(split), logits)
        return logits

    def digest(self, split: str) -> str:
        """Return the hash of a split, computed once."""
        if split not in self._digests:
            self._digests[split] = {"heldout": self.splits.heldout, **self.splits.reported()}[split].digest()
        return self._digests[split]

    def labels(self, split: str) -> Tensor:
        """Return the labels of a split, (N,)."""
        return {"heldout": self.splits.heldout, **self.splits.reported()}[split].labels

    def heldout_logits(self, weights: Weights) -> Tensor:
        """Return held-out logits of weights that a recipe made; the latest are kept."""
        return self._heldout_logits(weights, hash_weights(weights))

    def _heldout_logits(self, weights: Weights, name: str) -> Tensor:
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, self.logits(self.repaired(weights, name), "heldout"))
        return self._latest[1]

    def repaired(self, weights: Weights, name: str | None = None) -> Weights:
        """Return an average's weights with the BatchNorm statistics that `soup.batchnorm` asks for.

        Args:
            weights: that a recipe made; those of an ingredient or of the start keep their own statistics.
            name: their hash, where it is known.
        """
        if self.settings["soup"].get("batchnorm", AVERAGE) == AVERAGE:
            return weights
        name = name or hash_weights(weights)
        return weights if name in self._own else self.reestimated(weights, name)

    def reestimated(self, weights: Weights, name: str) -> Weights:
        """Return some weights with BatchNorm statistics measured for them on training data, without augmentation.

        The batches are the same for all weights, and every rank reads all of them: the bits do not depend on the ranks.

        Args:
            weights: of the network.
            name: their hash; statistics are measured once for each.
        """
        module = self.network.module
        if not batch_norms(module):
            return weights
        if name not in self._statistics:
            if not self._training_batches:
                self._training_batches = self._read_training_batches()
            module.load_state_dict(weights)
            reestimate(module, self._training_batches, lambda batch: forward(module, batch[0], self.device))
            self._statistics[name] = {
                key: tensor.to("cpu", weights[key].dtype) for key, tensor in statistics(module).items()
            }
        return {**weights, **self._statistics[name]}

    def _read_training_batches(self) -> list[Batch]:
        loader, samples = self.settings["loader"], self.splits.train
        dataset = self.network.input.dataset(samples, int(loader["size"]))
        count = int(self.settings["soup"].get("batchnorm_batches", BATCHES))
        chosen = list(islice(ShuffledBatches(len(samples), int(loader["batch_size"]), 0), count))
        return list(DataLoader(dataset, sampler=chosen, batch_size=None, num_workers=int(loader["workers"])))

    def score(self, weights: Weights) -> float:
        """Return the held-out score of some weights, larger is better; the same weights are evaluated once."""
        self.asked += 1
        name = hash_weights(weights)
        if name not in self._known:
            logits = self._heldout_logits(weights, name)
            self._known[name] = self.value(score(logits, self.labels("heldout"))), self.samples(logits, "heldout")
        value, self.latest_samples = self._known[name]
        self.on_score()
        return value

    def value(self, numbers: Score) -> float:
        """Return the selecting metric among some numbers, larger is better."""
        return self.sign * float(getattr(numbers, self.metric))

    def samples(self, logits: Tensor, split: str) -> Tensor:
        """Return per-sample scores in the selecting metric, (N,), larger is better."""
        labels = self.labels(split)
        return right(logits, labels).double() if self.metric == "accuracy" else -losses(logits, labels)

    def measured(self, members: Sequence[Ingredient]) -> list[Ingredient]:
        """Return records with held-out metrics: theirs, or where they have none, measured now."""
        return [record if "heldout" in record.metrics else self._measure(record) for record in members]

    def _measure(self, record: Ingredient) -> Ingredient:
        weights = LazyWeights(lambda: self.pool.weights(record.fingerprint))
        numbers = score(self.logits(weights, "heldout", record.weights), self.labels("heldout"))
        found = {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": float(numbers.count)}
        return record.model_copy(update={"metrics": {**record.metrics, "heldout": found}})

    def candidates(self, members: Sequence[Ingredient]) -> list[Candidate]:
        """Return measured ingredients as candidates."""
        self._own |= {record.weights for record in members}
        return [
            Candidate(
                record.short,
                self.sign * record.heldout(self.metric),
                lambda name=record.fingerprint: self.pool.weights(name),
                lambda name=record.fingerprint: self.pool.store(name),
            )
            for record in members
        ]

    def run(
        self,
        name: str,
        candidates: Sequence[Candidate],
        options: Mapping[str, Any],
        origin: Origin | None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Soup:
        """Make the soup of a recipe.

        Args:
            name: of the recipe.
            candidates: the ingredients.
            options: of the recipe; others are left out.
            origin: the model that it interpolates from, if it does.
            on_step: told of each decision, if the recipe tells.

        Raises:
            ConfigError: the recipe needs an origin and there is none.
        """
        recipe = RECIPES[name]
        needs = needs_of(recipe)
        given: dict[str, Any] = {}
        if "start" in needs:
            if origin is None and is_required(recipe, "start"):
                raise ConfigError(
                    f"The recipe {name} needs the model that fine-tuning started from, which nobody knows of checkpoints "
                    f"made elsewhere: soup.start=/path/of/a/checkpoint."
                )
            self._own |= {origin.weights} if origin else set()
            given["start"] = origin and Candidate(origin.name, float("nan"), origin.load)
        if "on_step" in needs:
            given["on_step"] = on_step
        if "labels" in needs:
            given["labels"] = self.labels("heldout")
        if "predict" in needs:
            given["predict"] = self.heldout_logits
        if "gradient" in needs:
            given["gradient"] = HeldoutGradient(self.network.module, self.heldout_batches(), self.device)
        if "fisher" in needs and options.get("form") == "fisher":
            given["fisher"] = lambda weights: diagonal_fisher(
                self.network.module, weights, self.heldout_batches(), self.device, _FISHER_SAMPLES
            )
        chosen = {key: options[key] for key in options_of(recipe) if key in options}
        judge = self._race(candidates, options) if name == "greedy" and options.get("racing") is not None else None
        soup = recipe(candidates, judge or self.score, **given, **chosen)
        path = [replace(point, load=lambda point=point: self.repaired(point.load())) for point in soup.path]
        return replace(soup, weights=dict(self.repaired(soup.weights)), path=path)

    def heldout_batches(self) -> list[Batch]:
        """Return the held-out split as batches, read once."""
        if "heldout" not in self._batches:
            self._batches["heldout"] = evaluation_batches(self.settings, self.splits.heldout, self.network)
        return self._batches["heldout"]

    def _race(self, candidates: Sequence[Candidate], options: Mapping[str, Any]) -> Race:
        """Return the judge of a greedy search that stops early; exact where `racing` is 0."""
        delta = float(options["racing"])
        count = len(self.labels("heldout"))
        if delta:
            order = random_order(count, 0)
        else:
            by_name = {record.short: record for record in self.pool.ingredients()}
            own = [
                self.logits(LazyWeights(candidate.load), "heldout", by_name[candidate.name].weights)
                for candidate in candidates
            ]
            order = hardest_first(torch.stack([-losses(logits, self.labels("heldout")) for logits in own]))
        world = ranks()[1]
        batches = in_order(self.heldout_batches(), order, -(-_RACE_BLOCK // world))
        metric = cast(Literal["accuracy", "loss"], self.metric)
        blocks = network_samples(self.network.module, batches, metric, self.device, world)
        return Race(
            lambda weights: blocks(self.repaired(weights)),
            1.0 if self.metric == "accuracy" else 0.0,
            delta,
            len(candidates),
        )


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read when a model needs them: stored predictions need none."""

    def __init__(self, load: Callable[[], Weights]) -> None:
        self._load = load
        self._weights: Weights | None = None

    def _get(self) -> Weights:
        if self._weights is None:
            self._weights = self._load()
        return self._weights

    def __getitem__(self, key: str) -> Tensor:
        return self._get()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())
