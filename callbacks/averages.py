"""Several averages in one callback."""

from __future__ import annotations

from collections.abc import Callable

from soups.averaging.mean import Mean
from soups.averaging.units import Plan
from soups.errors import ConfigError

from .base import Averaging


class Averages(Averaging):
    """Several averages, named by their keywords: `Averages(ema=EMA(decay=0.999), lawa=LAWA(k=10))`.

    Several callbacks on one Trainer come to the same; this is for where one callback is expected.

    Args:
        **members: name to averaging callback.

    Raises:
        ConfigError: no members, or members that are an `Averages` themselves.
    """

    def __init__(self, **members: Averaging) -> None:
        if not members:
            raise ConfigError(
                "Averages() was given nothing to keep. Write, for instance, Averages(ema=EMA(), lawa=LAWA())."
            )
        for name, member in members.items():
            if isinstance(member, Averages):
                raise ConfigError(
                    f"{name!r} is itself an Averages, whose members have names of their own. Give all of them to one "
                    f"Averages(...)."
                )
            member.settings.name = name
        self._members = list(members.values())
        super().__init__(self._members[0].settings)

    def members(self) -> list[Averaging]:
        """Return the callbacks it was made of."""
        return [inner for member in self._members for inner in member.members()]

    def make(self, plan: Plan, covers: Callable[[str], bool] | None) -> dict[str, Mean]:
        """Return the averages of all members."""
        return {name: mean for member in self.members() for name, mean in member.make(plan, covers).items()}
