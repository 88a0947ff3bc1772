"""Find a tensor's name in one checkpoint by its name in another: through the library's renames, prefixes and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from soups.stores.names.library import Architecture
from soups.stores.names.rules import filled, modern, template

Shapes = Mapping[str, tuple[int, ...] | None]
_DEEPEST = 3  # components of a prefix
_BODY = 4  # kinds of tensors that make a body


class NameMatcher:
    """The names of one checkpoint, to be found from others' names.

    Layers count as one name: a checkpoint of four layers matches one of six. A match asks for as many dimensions as the
    reference's tensor has.

    Args:
        shapes: the checkpoint's names, and the tensors' shapes (None where the shape is of no interest).
        architecture: what transformers knows of the checkpoint's class.
    """

    def __init__(self, shapes: Shapes, architecture: Architecture | None = None) -> None:
        self._architecture = architecture
        self._shapes: dict[str, tuple[int, ...] | None] = {}
        self._canonical: dict[str, str] = {}
        doubtful: set[str] = set()
        canonical = _canonical_names(shapes, architecture)
        for name, shape in shapes.items():
            pattern, numbers = template(name)
            self._shapes.setdefault(pattern, shape)
            meaning, own = template(canonical[name])
            if own != numbers or self._canonical.setdefault(meaning, pattern) != pattern:
                doubtful.add(meaning)  # the rename moves numbers, or two names mean one tensor: only exact names count
        for meaning in doubtful:
            self._canonical.pop(meaning, None)

    def match(
        self, shapes: Shapes, architecture: Architecture | None = None, *, prefixes: bool = True
    ) -> dict[str, str]:
        """Return the reference's name for each of another checkpoint's names that has one.

        Args:
            shapes: the other's names, and the tensors' shapes.
            architecture: what transformers knows of the other's class.
            prefixes: also look for a change of prefix that finds more names.
        """
        found: dict[str, str] = {}
        canonical = _canonical_names(shapes, architecture or self._architecture)
        for name, shape in shapes.items():
            place = self._exact(name, shape) or self._known(canonical[name], shape)
            if place is not None:
                found[name] = place
        while prefixes and (left := {name: shape for name, shape in shapes.items() if name not in found}):
            moved = self._moved(left, canonical, set(found.values()))
            if not moved:
                break
            found |= moved
        return _one_to_one(found)

    def _moved(self, left: Shapes, canonical: Mapping[str, str], taken: set[str]) -> dict[str, str]:
        """Return places that one change of prefix finds, of the names as they are or as the module has them."""
        for named in ({name: name for name in left}, {name: canonical[name] for name in left}):
            move = self._best_move({named[name]: shape for name, shape in left.items()}, taken)
            if move is None:
                continue
            found: dict[str, str] = {}
            for name, shape in left.items():
                moved = move(named[name])
                place = None if moved is None else self._exact(moved, shape) or self._known(moved, shape)
                if place is not None and place not in taken:
                    found[name] = place
            if found:
                return found
        return {}

    def _exact(self, name: str, shape: tuple[int, ...] | None) -> str | None:
        return name if self._fits(template(name)[0], shape) else None

    def _known(self, name: str, shape: tuple[int, ...] | None) -> str | None:
        pattern, numbers = template(name)
        place = self._canonical.get(pattern)
        return filled(place, numbers) if place is not None and self._fits(place, shape) else None

    def _fits(self, pattern: str, shape: tuple[int, ...] | None) -> bool:
        if pattern not in self._shapes:
            return False
        own = self._shapes[pattern]
        return own is None or shape is None or len(own) == len(shape)

    def _best_move(self, shapes: Shapes, taken: set[str]) -> Callable[[str], str | None] | None:
        """Return the change of prefix that finds most names, unless another one finds as many and contradicts it."""
        free = {pattern for pattern in self._shapes if not taken or pattern not in {template(one)[0] for one in taken}}
        targets = {meaning: place for meaning, place in self._canonical.items() if place in free}
        targets |= {pattern: pattern for pattern in free}
        mine = {template(name)[0]: shape for name, shape in shapes.items()}
        scores: Counter[tuple[str, str]] = Counter()
        places: dict[tuple[str, str], frozenset[tuple[str, str]]] = {}
        additions = ["", *_prefixes(targets)]
        for old in ["", *_prefixes(mine)]:
            inner = {name: name.removeprefix(old) for name in mine if name.startswith(old)}
            for new in additions:
                hits = frozenset(
                    (name, targets[new + rest])
                    for name, rest in inner.items()
                    if (new + rest) in targets and self._same(targets[new + rest], mine[name])
                )
                # One prefix for another is a guess, unless it carries a whole body of tensors over.
                if hits and (not old or not new or (len(hits) == len(inner) and len(hits) >= _BODY)):
                    scores[old, new], places[old, new] = len(hits), hits
        if not scores:
            return None
        best = max(scores.values())
        winners = [move for move, score in scores.items() if score == best]
        # Moves of other names to other places are no rivals; one name with two places, or one place for two names, is a guess.
        hits = set[tuple[str, str]]().union(*(places[move] for move in winners))
        if len({name for name, _ in hits}) < len(hits) or len({place for _, place in hits}) < len(hits):
            return None
        old, new = winners[0]
        return lambda name: new + name.removeprefix(old) if name.startswith(old) else None

    def _same(self, pattern: str, shape: tuple[int, ...] | None) -> bool:
        own = self._shapes[pattern]
        return own is None or shape is None or own == shape or (len(own) == len(shape) and own[1:] == shape[1:])


def _canonical_names(names: Iterable[str], architecture: Architecture | None) -> dict[str, str]:
    """Return names as the module has them, without the prefix under which heads keep the body."""
    named = {name: modern(architecture.renames(name) if architecture else name) for name in names}
    if architecture and architecture.prefix:
        bare = {name: one.removeprefix(f"{architecture.prefix}.") for name, one in named.items()}
        if len(set(bare.values())) == len(set(named.values())):
            return bare
    return named


def _prefixes(names: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, min(_DEEPEST, len(parts) - 1) + 1):
            found[".".join(parts[:count]) + "."] = None
    return list(found)


def _one_to_one(found: Mapping[str, str]) -> dict[str, str]:
    """Leave out names that would share a place; one that keeps its own name has the right to it."""
    count = Counter(found.values())
    return {name: place for name, place in found.items() if count[place] == 1 or name == place}
