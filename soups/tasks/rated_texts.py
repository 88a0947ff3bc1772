"""Texts with every rater's score: movie, product and newspaper sentences, and tweets (VADER's ground truth, ICWSM 2014).

The ratings come from the source archive of `vaderSentiment` (Hutto and Gilbert, MIT licence): four domains, 14 or more raters
a text, each score a whole number from -4 to 4.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from soups.errors import DataError, did_you_mean
from soups.tasks.data import Samples, Splits
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import VADER, fetch

DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}


@dataclass(frozen=True)
class RatedText:
    """A text and its raters' scores.

    Attributes:
        name: as in the source; sentences of one review or article share what stands before the underscore.
        text: as in the source, without surrounding space.
        ratings: one whole number from -4 to 4 a rater.
    """

    name: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The mean rating."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def group(self) -> str:
        """The review or article that the text is from."""
        return self.name.partition("_")[0]


def sentiment(
    domain: str = "movies",
    train: int = 1000,
    heldout: int = 500,
    test: int = 500,
    ood: Sequence[str] = ("tweets", "amazon", "nyt"),
    ood_size: int = 300,
    margin: float = 0.5,
    split_seed: int = 0,
) -> Splits:
    """Return a sentiment task, positive against negative by the mean rating; other domains are the OOD splits.

    Args:
        domain: a key of `DOMAINS`.
        train, heldout, test: sizes of the splits. All sentences of a review or article are on one side.
        ood: other domains, `ood_size` texts each.
        ood_size: texts of each OOD split.
        margin: texts whose mean rating lies within ±margin are left out.
        split_seed: of the random splits.

    Raises:
        DataError: an unknown domain, too few texts, or the data cannot be fetched.
    """
    for name in (domain, *ood):
        if name not in DOMAINS:
            raise DataError(f"There is no domain {name!r} of rated texts: {did_you_mean(name, DOMAINS)}")
    pool = [rated for rated in rated_texts(domain) if abs(rated.mean) >= margin]
    parts = draw(len(pool), (train, heldout, test), split_seed, [rated.group for rated in pool])
    chosen = [_labelled(pool[index] for index in part) for part in parts]
    others: dict[str, Samples] = {}
    for name in ood:
        if name == domain:
            continue
        rest = [rated for rated in rated_texts(name) if abs(rated.mean) >= margin]
        others[name] = _labelled(rest[index] for index in draw(len(rest), (ood_size,), split_seed)[0]).by_length()
    return Splits(chosen[0], chosen[1].by_length(), chosen[2].by_length(), ("negative", "positive"), others)


def _labelled(rated: Iterable[RatedText]) -> Texts:
    found = list(rated)
    return Texts([one.text for one in found], torch.tensor([one.mean > 0 for one in found]).long())


@lru_cache(maxsize=4)
def rated_texts(domain: str) -> tuple[RatedText, ...]:
    """Return the texts of one of `DOMAINS` with their ratings, each text once.

    Raises:
        DataError: the archive cannot be fetched, or a line of it is not what its description says.
    """
    name = DOMAINS[domain]
    archive = fetch(VADER) / VADER.files[0]
    with tarfile.open(archive) as members:

        def lines(file: str) -> list[str]:
            content = members.extractfile(f"hutto_ICWSM_2014/{file}")
            assert content is not None
            return io.TextIOWrapper(content, encoding="utf-8-sig").read().splitlines()

        texts, ratings = lines(f"{name}_GroundTruth.txt"), lines(f"{name}_anonDataRatings.txt")
    return tuple(parse_ratings(texts, ratings, f"{name}_GroundTruth.txt", f"{name}_anonDataRatings.txt"))


def parse_ratings(texts: Sequence[str], ratings: Sequence[str], texts_file: str, ratings_file: str) -> list[RatedText]:
    """Return rated texts from the lines of two tab-separated files that name the same texts.

    Means are computed from the ratings: those in the files disagree with them in places.

    Args:
        texts: lines of name, mean, text.
        ratings: lines of name, mean, standard deviation, `[rating, …]`.
        texts_file, ratings_file: where the lines come from, for errors.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    scores: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(ratings, 1):
        name, *_, values = _fields(line, 4, f"{ratings_file}, line {number}", "name, mean, deviation, ratings")
        try:
            found: Any = json.loads(values)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{ratings_file}, line {number}: the ratings {values[:60]!r} are no list: {error}."
            ) from error
        if not isinstance(found, list) or not found:
            raise DataError(f"{ratings_file}, line {number}: there are no ratings in {values[:60]!r}.")
        for rating in cast(list[Any], found):
            if not isinstance(rating, int) or not -4 <= rating <= 4:
                raise DataError(
                    f"{ratings_file}, line {number}: the rating {rating!r} is not a whole number from -4 to 4."
                )
        scores[name] = tuple(cast(list[int], found))
    rated: list[RatedText] = []
    seen: set[str] = set()
    for number, line in enumerate(texts, 1):
        name, _, text = _fields(line, 3, f"{texts_file}, line {number}", "name, mean, text")
        if name not in scores:
            raise DataError(f"{texts_file}, line {number}: {ratings_file} has no ratings of {name!r}.")
        text = text.strip()
        if not text:
            raise DataError(f"{texts_file}, line {number}: the text of {name!r} is empty.")
        if text.lower() not in seen:  # a few sentences stand in the source twice
            seen.add(text.lower())
            rated.append(RatedText(name, text, scores[name]))
    return rated


def _fields(line: str, count: int, where: str, what: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != count:
        raise DataError(f"{where}: {len(fields)} tab-separated fields instead of {count} ({what}): {line[:60]!r}")
    return fields
