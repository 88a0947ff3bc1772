"""Checkpoints made anywhere as candidates, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from soups.evaluation.cautions import averaged_statistics, running_statistics, statistics_gaps
from soups.recipes.recipe import Candidate, Score
from soups.stores.collection import CheckpointPath, find_checkpoints, open_fitted
from soups.weights import Weights, hash_weights

_REMEDY = (
    "Let `score` measure them for the weights it is given (soups.averaging.reestimate, on training batches), and measure "
    "the soup's."
)


def candidates(
    places: CheckpointPath | Sequence[CheckpointPath],
    like: Weights,
    score: Score,
    state: str | None = None,
    prefix: str | None = None,
) -> list[Candidate]:
    """Return the checkpoints at some places as candidates, each scored now.

    Args:
        places: a folder of Lightning `.ckpt`, timm `.pth`, `.safetensors` files or Hugging Face folders, or a list.
        like: the names and shapes that are wanted: your network's `state_dict()`.
        score: held-out score of some weights; larger is better.
        state: which weights of a training checkpoint; see `soups.stores.open_store`.
        prefix: of the network's names in the checkpoints; None to find it (a LightningModule's "model.", say).

    Returns:
        The candidates, in the order of their names. Of several with the same weights the first stays, with a warning; so
        there is where BatchNorm statistics differ.

    Raises:
        soups.errors.StorageError: a checkpoint is absent, damaged or hostile.
        soups.errors.WeightsError: one does not fit the network; its file is named.
    """
    found: list[Candidate] = []
    known: dict[str, str] = {}
    first: dict[str, Tensor] = {}
    gaps: dict[str, dict[str, float]] = {}
    for name, place in find_checkpoints(places).items():

        def load(place: str = place) -> dict[str, Tensor]:
            with open_fitted(place, like, state, prefix) as store:
                return store.load()

        weights = load()
        identity = hash_weights(weights)
        if identity in known:
            warnings.warn(f"{name} has the same weights as {known[identity]}: it counts once.", stacklevel=2)
            continue
        known[identity] = name
        first = first or {key: weights[key].clone() for key in running_statistics(weights)}
        gaps[name] = statistics_gaps(first, weights)
        found.append(Candidate(name, score(weights), load, lambda place=place: open_fitted(place, like, state, prefix)))
    if caution := averaged_statistics(gaps, remedy=_REMEDY):
        warnings.warn(caution.message, stacklevel=2)
    return found
