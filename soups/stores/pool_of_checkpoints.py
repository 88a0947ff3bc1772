"""A pool of checkpoints that were made elsewhere: read in place, never written to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soups.errors import StorageError, WeightsError, did_you_mean
from soups.stores.checkpoint import NoWeightsError
from soups.stores.collection import CheckpointPath, find_checkpoints, open_fitted, recorded_classes
from soups.stores.pool import Ingredient, Pool
from soups.stores.store import Store
from soups.weights import Weights, check_finite, hash_architecture, hash_weights


class CheckpointPool:
    """Checkpoints of one network, of any kind, with the reading half of `Pool`'s interface.

    An ingredient's fingerprint is the hash of its weights, so that copies are one ingredient. Metrics that a checkpoint
    records are of a split that nobody here knows; none are taken over.

    Args:
        places: a folder, or a list of files, Hugging Face folders and URLs.
        like: the network's state dict.
        cache: where predictions are kept, so that each model is evaluated once.
        state: which weights of a training checkpoint; see `soups.stores.open_store`.
        prefix: of the network's names in the files; None to find it.

    Attributes:
        url: the places, for messages.
        misfits: why checkpoints cannot be ingredients, by name.
        copies: names that have the weights of another, and that one's name.

    Raises:
        StorageError: a checkpoint is absent, damaged or hostile.
    """

    def __init__(
        self,
        places: CheckpointPath | Sequence[CheckpointPath],
        like: Weights,
        cache: Pool,
        state: str | None = None,
        prefix: str | None = None,
    ) -> None:
        found = find_checkpoints(places)
        self.url = str(places) if isinstance(places, str) else ", ".join(found.values())
        self._like, self._cache, self._state, self._prefix = like, cache, state, prefix
        self.misfits: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._records: dict[str, Ingredient] = {}
        for name, place in found.items():
            try:
                weights = self._read(place)
            except (WeightsError, NoWeightsError) as error:
                self.misfits[name] = str(error)
                continue
            identity = hash_weights(weights)
            if identity in self._records:
                self.copies[name] = self._records[identity].short
                continue
            self._places[identity] = place
            self._records[identity] = Ingredient(
                fingerprint=identity,
                determinants={"weights": identity},
                architecture=hash_architecture(weights),
                weights=identity,
                notes={"name": name, "place": place},
            )

    def ingredients(self) -> list[Ingredient]:
        """Return the records of all checkpoints that fit, in the order of their names."""
        return list(self._records.values())

    def ingredient(self, fingerprint: str) -> Ingredient:
        """Return the record of a checkpoint.

        Raises:
            StorageError: there is none.
        """
        if fingerprint not in self._records:
            raise StorageError(
                f"No checkpoint in {self.url} has the weights {fingerprint[:8]}: "
                f"{did_you_mean(fingerprint[:8], [name[:8] for name in self._records])}"
            )
        return self._records[fingerprint]

    def weights(self, fingerprint: str) -> dict[str, Tensor]:
        """Read a checkpoint's weights under the network's names."""
        return self._read(self._places[self.ingredient(fingerprint).fingerprint])

    def store(self, fingerprint: str) -> Store:
        """Open a checkpoint under the network's names; the caller closes it."""
        return open_fitted(
            self._places[self.ingredient(fingerprint).fingerprint], self._like, self._state, self._prefix
        )

    def predictions(self, weights_hash: str, split_hash: str) -> Tensor | None:
        """Return logits from the cache, or None."""
        return self._cache.predictions(weights_hash, split_hash)

    def add_predictions(self, weights_hash: str, split_hash: str, logits: Tensor) -> None:
        """Put logits into the cache."""
        self._cache.add_predictions(weights_hash, split_hash, logits)

    def other_orders(self, classes: Sequence[str]) -> dict[str, list[str]]:
        """Return the recorded class names of checkpoints that have the same names in another order, by name."""
        orders: dict[str, list[str]] = {}
        for identity, place in self._places.items():
            recorded = recorded_classes(place)
            if recorded and recorded != list(classes) and set(recorded) == set(classes):
                orders[self._records[identity].short] = recorded
        return orders

    def weights_file(self, fingerprint: str) -> None:
        """Return None: the file's tensors may have other names than the network's."""
        del fingerprint

    def start_file(self, weights_hash: str) -> None:
        """Return None: nobody knows the start."""
        del weights_hash

    def _read(self, place: str) -> dict[str, Tensor]:
        with open_fitted(place, self._like, self._state, self._prefix) as store:
            weights = store.load()
        check_finite(weights, where=place)
        return weights
