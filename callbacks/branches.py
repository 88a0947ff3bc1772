"""State of user code in two evaluations of one module: the raw weights' is the run's own, each average keeps one aside.

A validation loop leaves things behind: a best value so far, metrics, a scheduler that it has stepped. When an average is
evaluated after the raw weights, its evaluation starts from the state that the raw one started from, with whatever earlier
evaluations of the same average left there and training did not touch; afterwards the raw state is put back. So a best value
that is kept in Python is the raw weights' best for the raw weights and the average's best for the average.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .state import ObjectState, Slot

_HOOKS = "Write into them in training hooks, or use validate='average' or 'raw'."
Take = Callable[[Collection[int]], ObjectState]


class Branches:
    """The states of user code for the raw weights and for each average, from validation to validation.

    Args:
        take: records the present state of everything that user code can change; it is given ids of parameters and
            optimizers' tensors that must be copied.
    """

    def __init__(self, take: Take) -> None:
        self._take = take
        # Large parameters that evaluations write into (a teacher's): they are copied from then on.
        self._written: dict[int, Tensor] = {}
        self._before: ObjectState | None = None
        self._after: ObjectState | None = None
        # The state that the last validation left, its last hook included.
        self._settled: ObjectState | None = None
        self._pending: dict[str, ObjectState] = {}
        self._own: dict[str, dict[Slot, Any]] = {}
        # What raw validations change and training does not: the first value of each, for averages that begin later.
        self._first: dict[Slot, Any] = {}
        self._trained: set[Slot] = set()

    def _now(self) -> ObjectState:
        return self._take(self._written.keys())

    def before(self) -> None:
        """Record the state before the raw weights' evaluation."""
        self.settle()
        self._before = self._now()

    def after(self) -> None:
        """Record the state after it, the module's last hook (`on_validation_end`) still to come."""
        self._after = self._now()
        if self._before is not None and (written := self._before.uncopied(self._after)):
            self._written |= {key: tensor for key, (tensor, _) in written.items()}
            self._after = self._now()

    @property
    def ready(self) -> bool:
        """Whether the state before this evaluation was recorded."""
        return self._before is not None

    @contextmanager
    def of(self, name: str) -> Generator[ObjectState]:
        """Within the block user code is in the state of the average `name`; afterwards in the raw weights' again."""
        assert self._before is not None
        assert self._after is not None
        before, after = self._before, self._after
        # Layers that the raw weights' evaluation has built stay: both evaluate one model.
        changed = [slot for slot in before.differences(after) if before.knows(slot) and not before.structural(slot)]
        start = {slot: before.get(slot) for slot in changed if not (after.knows(slot) and after.structural(slot))}
        own = self._own.get(name)
        kept = self._first if own is None else own
        start |= {slot: value for slot, value in kept.items() if before.knows(slot) and self._untouched(slot)}
        # Iterators are used up by an evaluation, so it gets copies.
        before.lend_iterators()
        before.write(start)
        left: ObjectState | None = None
        try:
            yield after
            left = self._now()
        finally:
            now = left or self._now()
            after.put_back(now)
            if lost := after.uncopied(now):
                self._written |= {key: tensor for key, (tensor, _) in lost.items()}
                warn_of_written(f"the average {name!r} was evaluated", [place for _, place in lost.values()], _HOOKS)
        if left is not None:
            self._pending[name] = left

    def settle(self) -> None:
        """Record the state that a validation has left, once its last hook has run; does nothing at other times."""
        if self._before is None or self._after is None:
            return
        before, now = self._before, self._now()
        self._written |= {key: tensor for key, (tensor, _) in before.uncopied(now).items()}
        for slot in before.differences(now):
            if before.knows(slot) and slot not in self._trained and not before.structural(slot):
                if self._untouched(slot):
                    self._first.setdefault(slot, before.get(slot))
                else:
                    self._trained.add(slot)
                    self._first.pop(slot, None)
        for name, left in self._pending.items():
            different = [slot for slot in left.differences(now) if left.knows(slot) and now.knows(slot)]
            self._own[name] = {slot: left.get(slot) for slot in different if not now.structural(slot)}
        self._pending = {}
        # Slots are ids: those of objects that are gone may be given to others.
        for values in (self._first, *self._own.values()):
            for slot in [slot for slot in values if not now.knows(slot)]:
                del values[slot]
        self._trained = {slot for slot in self._trained if now.knows(slot)}
        self._settled, self._before, self._after = now, None, None

    def _untouched(self, slot: Slot) -> bool:
        """Tell whether training left a place alone since the last validation."""
        if self._settled is None or self._before is None:
            return True
        return self._settled.same(slot, self._before)


def warn_of_written(time: str, names: list[str], remedy: str) -> None:
    """Warn that user code wrote into large parameters or optimizers' tensors of which there was no copy.

    Args:
        time: the clause after "while".
        names: the tensors' names.
        remedy: a sentence that names the way out.
    """
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    warnings.warn(
        f"While {time}, a hook wrote into {names[:4]}{more}. They are too large for a copy of all of them, so they keep these "
        f"values, and training goes on with them. {remedy}",
        stacklevel=3,
    )
