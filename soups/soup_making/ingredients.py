"""Which ingredients a soup is made of: those in the pool that belong together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soups.errors import ConfigError, WeightsError
from soups.fitting.base_model import SharedModel
from soups.fitting.run import Run
from soups.soup_making.options import PROBE, SHARED, SoupOptions
from soups.stores import open_fitted
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool
from soups.weights import Weights, check_finite, describe_mismatch, hash_weights


@dataclass(frozen=True)
class Reference:
    """A model that is no ingredient: the base model, the linear probe, or a checkpoint that the user names.

    Attributes:
        name: shown to people.
        weights_hash: of its weights.
        load: reads them.
    """

    name: str
    weights_hash: str
    load: Callable[[], Weights]

    @classmethod
    def of(cls, name: str, model: SharedModel) -> Reference:
        """Return a shared model of the pool; its weights are read when they are needed."""
        return cls(name, model.record.weights, lambda: model.weights)


@dataclass(frozen=True)
class Chosen:
    """The ingredients of a soup, and sentences about those that were left out."""

    ingredients: list[Ingredient]
    remarks: list[str]


def from_elsewhere(run: Run) -> bool:
    """Tell whether the ingredients are checkpoints that were made elsewhere (`pool=folder`), and not a pool of ours."""
    return run.layout.pool.format == "checkpoints"


def open_ingredients(run: Run) -> Pool | CheckpointPool:
    """Open the ingredients that the settings name: a pool of our own, or checkpoints from elsewhere (`pool=folder`).

    Raises:
        soups.errors.StorageError: a checkpoint is absent, damaged or hostile.
    """
    if not from_elsewhere(run):
        return run.pool
    section = run.layout.pool
    like = run.network.module.state_dict()
    if section.cache is None:
        raise ConfigError("pool.cache has no value: name a folder for the predictions of these checkpoints.")
    return CheckpointPool(section.path, like, Pool(section.cache), section.state, section.prefix)


def choose_ingredients(run: Run, options: SoupOptions, pool: Pool | CheckpointPool) -> Chosen:
    """Return the ingredients that belong to the settings' task and base model.

    Raises:
        ConfigError: there are none.
        WeightsError: some differ in base model, architecture, split or order of classes, and `soup.foreign` is "refuse".
    """
    if isinstance(pool, CheckpointPool):
        return _from_elsewhere(run, options, pool)
    found, count = _sort_out(run, options, pool)
    if not count:
        raise ConfigError(
            f"The pool {pool.url} holds no ingredients to average. Fine-tune some: sweep.size=8, or "
            f"`python train.py -m optimizer.lr=1e-4,3e-4`."
        )
    if not found:
        raise ConfigError(f"None of the {count} ingredients in {pool.url} has this base model, architecture and split.")
    left = count - len(found)
    remarks = [f"{left} ingredients of another base model, architecture or split were left out."] if left else []
    return Chosen(found, remarks)


def refuse_foreign(run: Run, options: SoupOptions) -> None:
    """Check, before anything is trained, that the ingredients in the pool could be averaged with those to come.

    Raises:
        WeightsError: some differ in base model, architecture or split, and `soup.foreign` is "refuse".
    """
    if not from_elsewhere(run):
        _sort_out(run, options, run.pool)


def reference_of(run: Run, options: SoupOptions) -> Reference | None:
    """Return the model that `soup.start` names, or None when there is none, or the recipe needs none.

    Raises:
        soups.errors.SoupError: the checkpoint it names cannot be read or does not fit.
    """
    named = options.start
    if not options.needs_start:
        return None
    if named == SHARED and not from_elsewhere(run):
        return Reference.of("shared start", run.base_model)
    if named == PROBE and not from_elsewhere(run):
        return Reference.of("linear probe", run.probe)
    if named in (None, SHARED, PROBE):
        return None
    like = run.network.module.state_dict()

    def load() -> Weights:
        with open_fitted(Path(str(named)).expanduser(), like) as store:
            return store.load()

    weights = load()
    check_finite(weights, where=str(named))
    return Reference(Path(str(named)).stem, hash_weights(weights), load)


def _excluded(options: SoupOptions, record: Ingredient) -> bool:
    names = tuple(options.exclude)
    return bool(names) and (record.fingerprint.startswith(names) or record.short in names)


def _from_elsewhere(run: Run, options: SoupOptions, pool: CheckpointPool) -> Chosen:
    """Sort checkpoints from elsewhere out; see `choose_ingredients`."""
    skip, classes = options.foreign == "skip", run.splits.classes
    misfits = {name: why for name, why in pool.misfits.items() if name not in options.exclude}
    orders = pool.other_orders(classes)
    found = [record for record in pool.ingredients() if not _excluded(options, record)]
    orders = {record.short: orders[record.short] for record in found if record.short in orders}
    way_out = (
        f"Leave them out (soup.exclude=[{','.join([*misfits, *orders][:3])}], or soup.foreign=skip for all of them)"
    )
    if misfits and not skip:
        raise WeightsError(
            f"{len(misfits)} of the {len(misfits) + len(found)} checkpoints in {pool.url} cannot be averaged with the "
            f"others. {'; '.join(f'{name}: {why}' for name, why in list(misfits.items())[:3])} {way_out}."
        )
    if orders and not skip:
        name, recorded = next(iter(orders.items()))
        raise WeightsError(
            f"{len(orders)} of the {len(found)} checkpoints in {pool.url} have the classes in another order: {name} has "
            f"{_shown(recorded)}, the data have {_shown(classes)}. Their heads answer other questions, so that an "
            f"average would be wrong for both. {way_out}, or reorder the rows of their heads."
        )
    found = [record for record in found if record.short not in orders]
    if not found:
        raise ConfigError(f"{pool.url} holds no checkpoint that fits the model and the data.")
    remarks = [f"{name} has the same weights as {first}: it counts once." for name, first in pool.copies.items()]
    if misfits or orders:
        remarks.append(f"{', '.join([*misfits, *orders])} left out: another architecture or order of classes.")
    return Chosen(found, remarks)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _sort_out(run: Run, options: SoupOptions, pool: Pool) -> tuple[list[Ingredient], int]:
    """Return the ingredients that fit, and how many were looked at."""
    found = [record for record in pool.ingredients() if not _excluded(options, record)]
    if not found:
        return [], 0
    base = run.base_model
    expected = {"start": base.record.weights, "architecture": base.record.architecture, "split": run.split}
    problems: dict[str, list[str]] = {}
    for record in found:
        if differs := [key for key, value in expected.items() if getattr(record, key) != value]:
            problems[record.fingerprint] = [_how(key, record, run, pool) for key in differs]
    if problems and options.foreign == "refuse":
        kinds = Counter("; ".join(reasons) for reasons in problems.values())
        lines = [
            f"{', '.join(name[:8] for name in problems if '; '.join(problems[name]) == kind)}: {kind}" for kind in kinds
        ]
        raise WeightsError(
            f"{len(problems)} of the {len(found)} ingredients in {pool.url} cannot be averaged with the others: "
            f"{' | '.join(lines)}. Use a pool for each task and base model (pool.path=…), leave them out "
            f"(soup.exclude=[{','.join(name[:8] for name in list(problems)[:3])}], or soup.foreign=skip), or give the "
            f"settings they were made with."
        )
    return [record for record in found if record.fingerprint not in problems], len(found)


def _how(key: str, record: Ingredient, run: Run, pool: Pool) -> str:
    """Say how an ingredient differs, in settings where they are known."""
    if key == "architecture":
        with contextlib.suppress(WeightsError):
            if problem := describe_mismatch(run.base_model.weights, pool.weights(record.fingerprint)):
                return f"another architecture ({problem})"
        return "another architecture (tensors of other dtypes)"
    here: Mapping[str, Any] = run.configuration.plain()
    changes = [
        f"{name}.{leaf}: {record.config.get(name, {}).get(leaf)!r} there, {here[name].get(leaf)!r} here"
        for name in (("data",) if key == "split" else ("model", "start", "loader"))
        for leaf in sorted({*record.config.get(name, {}), *here[name]})
        if record.config.get(name, {}).get(leaf) != here[name].get(leaf) and not (name == "loader" and leaf != "size")
    ]
    kind = {"split": "another split", "start": "another start"}[key]
    return f"{kind} ({', '.join(changes) or 'its hash differs'})"
