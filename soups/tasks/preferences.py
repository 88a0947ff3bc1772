"""Preferences between texts: pairs built from real ratings, or read from files, for reward models.

A pair is a sample with two candidate texts; its label says which one is preferred, so that cross-entropy over the two
rewards is the Bradley-Terry loss, −log σ(r⁺ − r⁻).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from soups.errors import ConfigError, DataError, did_you_mean
from soups.seeding import generator
from soups.stores.files import fingerprint
from soups.tasks.data import Batch, Input, Keys, Samples, Splits
from soups.tasks.rated_texts import DOMAINS, RatedText, rated_texts
from soups.tasks.text_files import read_columns
from soups.tasks.texts import TextInput, Texts, draw, hash_texts, pad

CLASSES = ("first", "second")
# Shares of a domain's texts, of whole reviews or articles, for what must not see each other's texts.
PARTS = {"members": 0.4, "trajectory": 0.15, "control": 0.25, "test": 0.2}


class Pairs(Samples):
    """Pairs of texts.

    Args:
        first, second: N texts each.
        labels: 0 where the first text is preferred, 1 where the second is; int64 (N,).
        truth: what the labels should be, where it is known; int64 (N,).
        swapped: which labels were turned round on purpose; bool (N,).
    """

    augmented: ClassVar[bool] = False

    def __init__(
        self,
        first: Sequence[str],
        second: Sequence[str],
        labels: Tensor,
        truth: Tensor | None = None,
        swapped: Tensor | None = None,
    ) -> None:
        self.first, self.second, self.labels = list(first), list(second), labels
        self.truth = labels if truth is None else truth
        self.swapped = torch.zeros(len(labels), dtype=torch.bool) if swapped is None else swapped

    def digest(self) -> str:
        """Hash texts and labels."""
        return fingerprint([hash_texts(self.first), hash_texts(self.second), self.labels.tolist()])

    def identities(self) -> list[str]:
        """Return the two texts of each pair in alphabetical order, without regard to case and spacing."""
        pairs = zip(self.first, self.second, strict=True)
        return ["\n".join(sorted(" ".join(text.split()).casefold() for text in pair)) for pair in pairs]

    def take(self, indices: Tensor) -> Pairs:
        """Return the pairs at `indices`, int64 (M,)."""
        first, second = ([side[index] for index in indices.tolist()] for side in (self.first, self.second))
        return Pairs(first, second, self.labels[indices], self.truth[indices], self.swapped[indices])


class PairTokens(Dataset[Batch]):
    """Tokenised candidates as model input: `input_ids` and `attention_mask`, int64 (B, K, longest), and labels (B,).

    Args:
        candidates: for each of the K places the token ids of all N samples.
        labels: (N,).
        padding: the id to pad with.
    """

    def __init__(self, candidates: Sequence[Sequence[Tensor]], labels: Tensor, padding: int) -> None:
        self.candidates, self.labels, self.padding = candidates, labels, padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keys: Keys) -> Batch:
        """Return a batch, padded to its longest text."""
        indices = [index for _, index in keys]
        flat = pad([place[index] for index in indices for place in self.candidates], self.padding)
        inputs = {name: value.unflatten(0, (len(indices), len(self.candidates))) for name, value in flat.items()}
        return inputs, self.labels[indices]


@dataclass(frozen=True)
class RewardInput(Input):
    """Pairs of texts (two candidates a sample), or single texts (one), for a model with one output."""

    texts: TextInput

    def dataset(
        self, samples: Samples, size: int, augment: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Dataset[Batch]:
        """Return texts of at most `size` tokens. They are not augmented."""
        del augment, seed
        if isinstance(samples, Pairs):
            places = [samples.first, samples.second]
        elif isinstance(samples, Texts):
            places = [samples.texts]
        else:
            raise ConfigError(
                f"A reward model reads pairs of texts, but the data are {type(samples).__name__}: choose data=preferences."
            )
        ids = [self.texts.tokenise(place, size) for place in places]
        return PairTokens(ids, samples.labels, int(self.texts.tokenizer.pad_token_id))


def preferences(
    domain: str = "movies",
    train: int = 300,
    heldout: int = 150,
    test: int = 300,
    ood: Sequence[str] = ("tweets", "amazon", "nyt"),
    gap: float = 0.5,
    swapped: float = 0.0,
    rater: str = "one",
    part: str = "members",
    pairs_per_text: int = 1,
    split_seed: int = 0,
) -> Splits:
    """Return preferences between rated texts.

    The preferred text of a training or held-out pair is the one that one random rater a text scored higher; pairs that this
    rater ties are left out. Test and OOD pairs are labelled by the mean of all raters. All pairs are of texts whose means
    differ by at least `gap`. No text is in two pairs, but for training pairs with `pairs_per_text` above one.

    Args:
        domain: a key of `soups.tasks.rated_texts.DOMAINS`.
        train, heldout, test: numbers of pairs.
        ood: other domains, `test` pairs each.
        gap: smallest difference of mean ratings.
        swapped: share of training and held-out pairs whose labels are turned round besides.
        rater: "one" a text, or "all": labels by the mean, without noise.
        part: which of `PARTS` training and held-out texts are from; no part sees another one's.
        pairs_per_text: most training pairs that a text is in, each with another partner and rater of its own.
        split_seed: of everything that is random.

    Raises:
        DataError: an unknown domain or part, or too few texts.
    """
    for name in (domain, *ood):
        if name not in DOMAINS:
            raise DataError(f"There is no domain {name!r} of rated texts: {did_you_mean(name, DOMAINS)}")
    if part not in PARTS or part == "test":
        raise DataError(f"data.part={part}: {did_you_mean(part, [name for name in PARTS if name != 'test'])}")
    if rater not in ("one", "all"):
        raise DataError(f"data.rater={rater} must be one or all.")
    if not 0 <= swapped < 0.5:
        raise DataError(f"data.swapped={swapped} must be in [0, 0.5).")
    if pairs_per_text < 1:
        raise DataError(f"data.pairs_per_text={pairs_per_text} must be at least 1.")
    own = parts(domain, split_seed)
    share = heldout / (train / pairs_per_text + heldout)
    cut = len(own[part]) - round(share * len(own[part]))
    noisy = rater == "one"
    return Splits(
        pair_up(own[part][:cut], train, gap, noisy, swapped, split_seed, f"{domain} ({part}, train)", pairs_per_text),
        pair_up(own[part][cut:], heldout, gap, noisy, swapped, split_seed, f"{domain} ({part}, held-out)"),
        pair_up(own["test"], test, gap, False, 0.0, split_seed, f"{domain} (test)"),
        CLASSES,
        {
            name: pair_up(parts(name, split_seed)["test"], test, gap, False, 0.0, split_seed, f"{name} (OOD)")
            for name in ood
            if name != domain
        },
    )


def parts(domain: str, seed: int) -> dict[str, list[RatedText]]:
    """Return a domain's texts in random order, cut into `PARTS`; a review or article is in one part only."""
    rated = rated_texts(domain)
    groups = [one.group for one in rated]
    order = draw(len(rated), (len(rated),), seed, groups)[0]
    found: dict[str, list[RatedText]] = {}
    place, share = 0, 0.0
    for name, size in PARTS.items():
        share += size
        end = round(share * len(order))
        while 0 < end < len(order) and groups[order[end]] == groups[order[end - 1]]:
            end += 1
        found[name] = [rated[index] for index in order[place:end]]
        place = end
    return found


def pair_up(
    rated: Sequence[RatedText],
    count: int,
    gap: float,
    noisy: bool,
    swapped: float,
    seed: int,
    what: str,
    uses: int = 1,
) -> Pairs:
    """Return `count` pairs of the first texts that make one, with labels as `preferences` describes them.

    Each of `uses` passes over the texts puts every text into one more pair at most; the first is in the given order.
    """
    random = generator(seed, "pairs", what)

    def draw_number(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    first: list[str] = []
    second: list[str] = []
    labels: list[int] = []
    truth: list[int] = []
    for pair in _partners(rated, gap, uses, seed, what):
        if len(first) == count:
            break
        pair = pair if draw_number(2) else pair[::-1]
        scores = [float(text.ratings[draw_number(len(text.ratings))]) if noisy else text.mean for text in pair]
        if scores[0] == scores[1]:
            continue
        first.append(pair[0].text)
        second.append(pair[1].text)
        labels.append(int(scores[1] > scores[0]))
        truth.append(int(pair[1].mean > pair[0].mean))
    if len(first) < count or count < 1:
        raise DataError(f"{what}: {count} pairs are asked for, but its {len(rated)} texts give only {len(first)}.")
    turned = torch.zeros(count, dtype=torch.bool)
    turned[torch.randperm(count, generator=random)[: round(swapped * count)]] = True
    given = torch.tensor(labels)
    return Pairs(first, second, torch.where(turned, 1 - given, given), torch.tensor(truth), turned)


def _partners(
    rated: Sequence[RatedText], gap: float, uses: int, seed: int, what: str
) -> Iterator[tuple[RatedText, RatedText]]:
    """Yield pairs of texts whose means differ by `gap`, each text once in a pass, no pair twice."""
    made: set[frozenset[int]] = set()
    for turn in range(uses):
        order = list(range(len(rated)))
        if turn:
            order = torch.randperm(len(rated), generator=generator(seed, "pairs", what, turn)).tolist()
        waiting: list[int] = []
        for one in order:
            partner = next(
                (
                    other
                    for other in waiting
                    if abs(rated[one].mean - rated[other].mean) >= gap and frozenset((one, other)) not in made
                ),
                None,
            )
            if partner is None:
                waiting.append(one)
                continue
            waiting.remove(partner)
            made.add(frozenset((one, partner)))
            yield rated[one], rated[partner]


def pair_files(
    train: str,
    heldout: str,
    test: str,
    ood: Mapping[str, str] | None = None,
    chosen: str = "chosen",
    rejected: str = "rejected",
    split_seed: int = 0,
) -> Splits:
    """Return preferences from `.csv`, `.tsv` or `.jsonl` files with a column of chosen texts and one of rejected ones.

    Args:
        train, heldout, test: files.
        ood: files of the out-of-distribution splits, by name.
        chosen, rejected: names of the columns.
        split_seed: of the order in which a pair's texts are shown to the model.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """

    def read(path: str) -> Pairs:
        pairs: list[tuple[str, str]] = []
        for values, line in read_columns(Path(path).expanduser(), (chosen, rejected)):
            for name, value in zip((chosen, rejected), values, strict=True):
                if not isinstance(value, str) or not value.strip():
                    raise DataError(f"{path}, line {line}: {name!r} is {value!r}; it must be some words.")
            if values[0].strip() == values[1].strip():
                raise DataError(f"{path}, line {line}: the chosen and the rejected text are the same.")
            pairs.append((values[0].strip(), values[1].strip()))
        if not pairs:
            raise DataError(f"{path} holds no pairs.")
        second = torch.rand(len(pairs), generator=generator(split_seed, "order")) < 0.5
        shown = [pair[::-1] if turn else pair for pair, turn in zip(pairs, second.tolist(), strict=True)]
        return Pairs([one for one, _ in shown], [two for _, two in shown], second.long())

    others: dict[str, Samples] = {name: read(path) for name, path in (ood or {}).items()}
    return Splits(read(train), read(heldout), read(test), CLASSES, others)
