"""Scores and predictions of any weights of a network on any split, made once and kept in the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soups.evaluation import Batch, Score, predict, score
from soups.evaluation.statistics import losses, right
from soups.fitting.run import Run
from soups.fitting.task import evaluation_batches
from soups.recipes import Candidate
from soups.soup_making.batchnorm import BatchNorm
from soups.soup_making.models import LazyWeights, Models
from soups.soup_making.options import AVERAGE, SoupOptions
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool
from soups.tasks.data import Samples
from soups.weights import Weights, hash_weights

HELDOUT = "heldout"


@dataclass(frozen=True)
class Scored:
    """A held-out score, larger is better, and the per-sample scores behind it, (N,)."""

    value: float
    samples: Tensor


class SoupEvaluator:
    """The network, splits and pool of a run, and what models score on them.

    Args:
        run: the settings, with their data and network.
        options: of the soup.
        pool: of the ingredients.
        device: for the network.
        writes: keep predictions in the pool; one rank of several does.

    Attributes:
        models: the ingredients' weights.
        on_score: called after each held-out score, for progress.
        evaluations: of the network on a split, so far.
        asked: held-out scores that recipes asked for, so far; one that is known already counts.
        latest_samples: per-sample scores behind the latest of them, (N,).
    """

    def __init__(
        self,
        run: Run,
        options: SoupOptions,
        pool: Pool | CheckpointPool,
        device: torch.device | None = None,
        writes: bool = True,
    ) -> None:
        self.run, self.options, self.pool, self.writes = run, options, pool, writes
        self.device = device or run.device
        self.models = Models(pool)
        self.network = run.network
        self.network.module.to(self.device)
        self.on_score: Callable[[], None] = lambda: None
        self.evaluations = self.asked = 0
        self.latest_samples = torch.empty(0)
        self.splits: dict[str, Samples] = {HELDOUT: run.splits.heldout, **run.splits.reported()}
        self.batchnorm = BatchNorm(run, self.network, self.device, options.batchnorm_batches)
        self._batches: dict[str, list[Batch]] = {}
        self._digests: dict[str, str] = {}
        self._known: dict[str, Scored] = {}
        self._latest: tuple[str, Tensor] | None = None
        # Hashes of models whose BatchNorm statistics are their own: ingredients and references.
        self._own: set[str] = set()

    @property
    def metric(self) -> str:
        """The held-out metric that selects: "accuracy" or "loss"."""
        return self.options.metric

    @property
    def sign(self) -> float:
        """The factor that makes larger better: 1 for an accuracy, -1 for a loss."""
        return 1.0 if self.metric == "accuracy" else -1.0

    def logits(self, weights: Weights, split: str, weights_hash: str | None = None) -> Tensor:
        """Return logits (N, classes) of some weights on a split; stored in the pool when their hash is given."""
        if weights_hash and (stored := self.pool.predictions(weights_hash, self.digest(split))) is not None:
            return stored
        if split not in self._batches:
            self._batches = {key: value for key, value in self._batches.items() if key == HELDOUT}
            self._batches[split] = self._read(split)
        self.network.module.load_state_dict(weights)
        logits = predict(self.network.module, self._batches[split], self.device)
        self.evaluations += 1
        if weights_hash and self.writes:
            self.pool.add_predictions(weights_hash, self.digest(split), logits)
        return logits

    def _read(self, split: str) -> list[Batch]:
        layout = self.run.layout
        return evaluation_batches(self.splits[split], self.network, self.run.asked.loader.size, layout.loader)

    def digest(self, split: str) -> str:
        """Return the hash of a split, computed once."""
        if split not in self._digests:
            self._digests[split] = self.splits[split].digest()
        return self._digests[split]

    def labels(self, split: str) -> Tensor:
        """Return the labels of a split, (N,)."""
        return self.splits[split].labels

    def heldout_batches(self) -> list[Batch]:
        """Return the held-out split as batches, read once."""
        if HELDOUT not in self._batches:
            self._batches[HELDOUT] = self._read(HELDOUT)
        return self._batches[HELDOUT]

    def heldout_logits(self, weights: Weights) -> Tensor:
        """Return held-out logits of weights that a recipe made; the latest are kept."""
        return self._heldout_logits(weights, hash_weights(weights))

    def _heldout_logits(self, weights: Weights, weights_hash: str) -> Tensor:
        if self._latest is None or self._latest[0] != weights_hash:
            self._latest = (weights_hash, self.logits(self.repaired(weights, weights_hash), HELDOUT))
        return self._latest[1]

    def keeps_statistics(self, weights_hash: str) -> None:
        """Let a model that is no average keep its own BatchNorm statistics."""
        self._own.add(weights_hash)

    def repaired(self, weights: Weights, weights_hash: str | None = None) -> Weights:
        """Return an average's weights with the BatchNorm statistics that `soup.batchnorm` asks for.

        Args:
            weights: that a recipe made; ingredients and references keep their own statistics.
            weights_hash: their hash, where it is known.
        """
        if self.options.batchnorm == AVERAGE:
            return weights
        weights_hash = weights_hash or hash_weights(weights)
        return weights if weights_hash in self._own else self.batchnorm.reestimated(weights, weights_hash)

    def score(self, weights: Weights) -> float:
        """Return the held-out score of some weights, larger is better; the same weights are evaluated once."""
        self.asked += 1
        name = hash_weights(weights)
        if name not in self._known:
            logits = self._heldout_logits(weights, name)
            numbers = score(logits, self.labels(HELDOUT))
            self._known[name] = Scored(self.value(numbers), self.samples(logits, HELDOUT))
        self.latest_samples = self._known[name].samples
        self.on_score()
        return self._known[name].value

    def value(self, numbers: Score) -> float:
        """Return the selecting metric among some numbers, larger is better."""
        return self.sign * float(getattr(numbers, self.metric))

    def samples(self, logits: Tensor, split: str) -> Tensor:
        """Return per-sample scores in the selecting metric, (N,), larger is better."""
        labels = self.labels(split)
        return right(logits, labels).double() if self.metric == "accuracy" else -losses(logits, labels)

    def measured(self, ingredients: Sequence[Ingredient]) -> list[Ingredient]:
        """Return records with held-out metrics: their own, or measured now where they have none."""
        return [record if HELDOUT in record.metrics else self._measure(record) for record in ingredients]

    def _measure(self, record: Ingredient) -> Ingredient:
        weights = LazyWeights(lambda: self.models.weights(record.fingerprint))
        numbers = score(self.logits(weights, HELDOUT, record.weights), self.labels(HELDOUT))
        found = {"accuracy": numbers.accuracy, "loss": numbers.loss, "count": float(numbers.count)}
        return record.model_copy(update={"metrics": {**record.metrics, HELDOUT: found}})

    def best_first(self, ingredients: Sequence[Ingredient]) -> list[Ingredient]:
        """Return measured ingredients by their own held-out score in the selecting metric, the best first."""
        return sorted(ingredients, key=lambda record: -self.sign * record.heldout(self.metric))

    def candidates(self, ingredients: Sequence[Ingredient]) -> list[Candidate]:
        """Return measured ingredients as candidates."""
        self._own |= {record.weights for record in ingredients}
        return [
            Candidate(
                record.short,
                self.sign * record.heldout(self.metric),
                lambda name=record.fingerprint: self.models.weights(name),
                lambda name=record.fingerprint: self.pool.store(name),
            )
            for record in ingredients
        ]
