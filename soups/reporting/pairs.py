"""How far apart the ingredients of a soup are, in weights and in what they answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soups.evaluation.diversity import agreement as share_of_equal_answers
from soups.merging.compare import products
from soups.reporting.page import Matrix
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool

# Inner products of N models cost N² multiplications a parameter; above this many (minutes on one core) they are left out.
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
        found += distances(names, products(files, start))
    logits = [pool.predictions(record.weights, heldout) for record in ordered]
    known = [values for values in logits if values is not None]
    if len(known) == len(ordered):
        found.append(agreement(names, known))
    return found


def distances(names: Sequence[str], gram: Tensor) -> list[Matrix]:
    """Return heatmaps of distances and of cosines, from inner products of displacements from the start.

    Args:
        names: of N models.
        gram: (N, N), float64.
    """
    squares = gram.diagonal()
    between = (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0).sqrt()
    between.fill_diagonal_(0)
    own = squares.clamp_min(0).sqrt()
    whole = torch.zeros(len(names) + 1, len(names) + 1, dtype=torch.float64)
    whole[1:, 1:], whole[0, 1:], whole[1:, 0] = between, own, own
    labels = ["start", *names]
    cosines = (gram / (own[:, None] * own[None, :]).clamp_min(1e-300)).clamp(-1, 1).fill_diagonal_(1)
    return [
        Matrix(
            title="Distance between weights",
            note="Euclidean norm of the difference. Ingredients far from each other seldom average well.",
            row_labels=labels,
            column_labels=labels,
            values=whole.tolist(),
            value_label="distance",
        ),
        Matrix(
            title="Direction of fine-tuning",
            note="Cosine between what fine-tuning added to the start: 1 the same way, 0 unrelated.",
            row_labels=list(names),
            column_labels=list(names),
            values=cosines.tolist(),
            value_label="cosine",
        ),
    ]


def agreement(names: Sequence[str], logits: Sequence[Tensor]) -> Matrix:
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
        values=(100 * share_of_equal_answers(logits)).tolist(),
        value_label="same answer, %",
    )
