"""Which ingredients of a pool a soup of somebody's program is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from soups.errors import ConfigError, WeightsError
from soups.launch.own_program.configuration import Program
from soups.launch.own_program.validation_data import ValidationData
from soups.stores.pool import Ingredient, Pool
from soups.weights import hash_architecture


@dataclass(frozen=True)
class ProgramIngredients:
    """The ingredients of a soup, and what to tell the user of the others."""

    members: list[Ingredient]
    told: list[str]


def choose_members(
    program: Program,
    pool: Pool,
    asked: Sequence[str],
    data: ValidationData,
    foreign: str = "refuse",
    exclude: Sequence[str] = (),
    older: bool = False,
) -> ProgramIngredients:
    """Return the ingredients that belong together: those that the command asked for, and by choice older ones.

    Args:
        program: with its start.
        pool: of the ingredients.
        asked: fingerprints of what the command asked for; none of them for "what the pool holds".
        data: that the program validates on now.
        foreign: "refuse" ingredients of another start or other validation data, or "skip" them.
        exclude: beginnings of fingerprints to leave out.
        older: take ingredients of earlier commands too.

    Raises:
        ConfigError: there are none.
        WeightsError: some have another start or were validated on other data, and `foreign` is "refuse".
    """
    left_out = tuple(exclude)
    found = [record for record in pool.ingredients() if not (left_out and record.fingerprint.startswith(left_out))]
    wanted = [record for record in found if older or not asked or record.fingerprint in asked]
    reasons = {record.short: why for record in wanted if (why := _why_not(record, program, pool, data))}
    if reasons and foreign == "refuse":
        kinds = Counter(reasons.values())
        lines = [f"{', '.join(name for name in reasons if reasons[name] == kind)}: {kind}" for kind in kinds]
        raise WeightsError(
            f"{len(reasons)} of the {len(wanted)} ingredients in {pool.url} cannot be averaged with the others. "
            f"{' | '.join(lines)}. Averages of models with different starts are no better than chance, and metrics that were "
            f"measured on other data choose nothing. Use a pool for each start and split (++pool.path=…), or leave them out "
            f"(soup.foreign=skip)."
        )
    members = [record for record in wanted if record.short not in reasons]
    if not members:
        raise ConfigError(
            f"The pool {pool.url} holds no ingredients of this start and data to average. Fine-tune some: ++sweep.size=8."
        )
    told = [f"{_count(len(reasons))} of another start or other validation data left out."] if reasons else []
    others = [record for record in found if record not in wanted]
    fitting = [record for record in others if not _why_not(record, program, pool, data)]
    if fitting:
        told.append(
            f"The pool holds {_count(len(fitting))} of earlier commands with the same start and data, which this soup leaves "
            f"out: ++soup.older=true takes them in."
        )
    return ProgramIngredients(members, told)


def _count(number: int) -> str:
    return f"{number} ingredient{'' if number == 1 else 's'}"


def _why_not(record: Ingredient, program: Program, pool: Pool, data: ValidationData) -> str:
    """Return why an ingredient cannot be averaged with those of the program, or ""."""
    start = pool.start(program.spec.start) if record.start == program.spec.start else None
    if start is None:
        return "another start (pretrained weights, seed or sizes of the untrained model differ)"
    if record.architecture != hash_architecture(start[1]):
        return "another architecture"
    own = record.notes.get("validation")
    if own is None:
        return "made before this program recorded the validation data"
    if why := data.differs(ValidationData.model_validate(own)):
        return f"validated on other data ({why})"
    return ""
