"""How far apart the ingredients of a soup are, in weights and in what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from soups.evaluation import agreement, distances
from soups.evaluation.diversity import cosines
from soups.reporting.page import Matrix
from soups.stores import open_store
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool

# Distances between N models cost N² multiplications a parameter; above this many (minutes on one core) they are left out.
_MOST = 2e11
_MOST_MODELS = 64


def compare_members(pool: Pool | CheckpointPool, members: Sequence[Ingredient], heldout: str) -> list[Matrix]:
    """Return heatmaps of a soup's ingredients, best first: distances and angles of their weights, agreement of their answers.

    Distances are left out for pools that are not local and where they would cost minutes; agreement where the pool lacks
    predictions.

    Args:
        pool: that holds the ingredients.
        members: records of at least two ingredients with one start.
        heldout: hash of the held-out split, which their stored predictions go by.
    """
    if not 2 <= len(members) <= _MOST_MODELS:
        return []
    ordered = sorted(members, key=lambda record: -record.metrics.get("heldout", {}).get("accuracy", 0.0))
    names = [record.short for record in ordered]
    found: list[Matrix] = []
    files = [path for record in ordered if (path := pool.weights_file(record.fingerprint))]
    start = pool.start_file(ordered[0].start or "")
    small = len(ordered) ** 2 * ordered[0].file_bytes / 4 < _MOST
    if small and start is not None and len(files) == len(ordered):
        with ExitStack() as stack:
            gaps = distances([stack.enter_context(open_store(place)) for place in (start, *files)])
        found += distance_heatmaps(names, gaps)
    logits = [pool.predictions(record.weights, heldout) for record in ordered]
    known = [values for values in logits if values is not None]
    if len(known) == len(ordered):
        found.append(agreement_heatmap(names, known))
    return found


def distance_heatmaps(names: Sequence[str], gaps: Tensor) -> list[Matrix]:
    """Return heatmaps of the distances of N models and their start, and of the cosines between what was added to it.

    Args:
        names: of the models.
        gaps: `soups.evaluation.distances` of the start and the models, (N + 1, N + 1).
    """
    labels = ["start", *names]
    still = gaps[0, 1:] == 0  # no direction where nothing moved
    directions = cosines(gaps)[1:, 1:].masked_fill(still[:, None] | still[None], 0.0)
    directions = directions.clamp(-1, 1).fill_diagonal_(1)
    return [
        Matrix(
            title="Distance between weights",
            note="Euclidean norm of the difference. Ingredients far from each other seldom average well.",
            row_labels=labels,
            column_labels=labels,
            values=gaps.tolist(),
            value_label="distance",
        ),
        Matrix(
            title="Direction of fine-tuning",
            note="Cosine between what fine-tuning added to the start: 1 the same way, 0 unrelated.",
            row_labels=list(names),
            column_labels=list(names),
            values=directions.tolist(),
            value_label="cosine",
        ),
    ]


def agreement_heatmap(names: Sequence[str], logits: Sequence[Tensor]) -> Matrix:
    """Return a heatmap of the share of held-out samples, in %, on which two models answer the same.

    Args:
        names: of N models.
        logits: (samples, classes) of each.
    """
    return Matrix(
        title="Agreement on the held-out split",
        note="Share of samples with the same answer. Soups gain from ingredients that err differently.",
        row_labels=list(names),
        column_labels=list(names),
        values=(100 * agreement(logits)).tolist(),
        value_label="same answer, %",
    )
