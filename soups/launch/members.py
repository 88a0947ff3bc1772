"""Which ingredients a soup is made of: what the pool holds, and what of it belongs together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soups.errors import ConfigError, WeightsError
from soups.launch.settings import Settings, build_network, build_splits, from_elsewhere, open_pool
from soups.launch.start import ensure_probe, ensure_start
from soups.stores import open_fitted
from soups.stores.pool import Ingredient, Pool
from soups.stores.pool_of_checkpoints import CheckpointPool
from soups.tasks.data import Splits
from soups.tasks.network import Network
from soups.weights import Weights, check_finite, describe_mismatch, hash_weights

# What `soup.start` may say besides a path.
SHARED, PROBE = "shared", "probe"


@dataclass(frozen=True)
class Origin:
    """The model that recipes interpolate from.

    Attributes:
        name: shown to people.
        weights: hash.
        load: reads it.
    """

    name: str
    weights: str
    load: Callable[[], Weights]


def empty_network(settings: Settings, splits: Splits) -> Network:
    """Return the network of some settings without pretrained weights."""
    return build_network({**settings, "model": {**settings["model"], "pretrained": False}}, len(splits.classes))


def open_ingredients(settings: Settings, splits: Splits) -> Pool | CheckpointPool:
    """Open the ingredients that the settings name: a pool of our own, or checkpoints from elsewhere (`pool=folder`).

    Raises:
        soups.errors.StorageError: a checkpoint is absent, damaged or hostile.
    """
    if not from_elsewhere(settings):
        return open_pool(settings)
    section = settings["pool"]
    like = empty_network(settings, splits).module.state_dict()
    return CheckpointPool(section["path"], like, Pool(section["cache"]), section["state"], section["prefix"])


def choose_members(
    settings: Settings, pool: Pool | CheckpointPool, splits: Splits | None = None
) -> tuple[list[Ingredient], list[str]]:
    """Return the ingredients that belong to the settings' task and start, and what to tell of those that do not.

    Raises:
        ConfigError: there are none.
        WeightsError: some differ in start, architecture, split or order of classes, and `soup.foreign` is "refuse".
    """
    splits = splits or build_splits(settings)
    if isinstance(pool, CheckpointPool):
        return _from_elsewhere(settings, pool, splits)
    members, count = _sort_out(settings, pool, splits)
    if not count:
        raise ConfigError(
            f"The pool {pool.url} holds no ingredients to cook. Fine-tune some: sweep.size=8, or "
            f"`python train.py -m optimizer.lr=1e-4,3e-4`."
        )
    if not members:
        raise ConfigError(f"None of the {count} ingredients in {pool.url} has this start, architecture and split.")
    told = [f"{count - len(members)} ingredients of another start, architecture or split were left out."]
    return members, told if len(members) < count else []


def refuse_foreign(settings: Settings) -> None:
    """Check, before anything is trained, that what the pool holds could be averaged with what is to come.

    Raises:
        WeightsError: some ingredients differ in start, architecture or split, and `soup.foreign` is "refuse".
    """
    if not from_elsewhere(settings):
        _sort_out(settings, open_pool(settings))


def origin_of(settings: Settings, splits: Splits) -> Origin | None:
    """Return the model that `soup.start` names, or None when there is none.

    Raises:
        ConfigError: it names ours ("shared", "probe") for checkpoints from elsewhere.
        soups.errors.SoupError: the checkpoint it names cannot be read or does not fit.
    """
    named = settings["soup"].get("start")
    if named in (SHARED, PROBE) and not from_elsewhere(settings):
        make = ensure_start if named == SHARED else ensure_probe
        record, weights = make(settings, splits)
        return Origin("shared start" if named == SHARED else "linear probe", record.weights, lambda: weights)
    if named in (None, SHARED, PROBE):
        return None
    like = empty_network(settings, splits).module.state_dict()

    def load() -> Weights:
        with open_fitted(Path(str(named)).expanduser(), like) as store:
            return store.load()

    weights = load()
    check_finite(weights, where=str(named))
    return Origin(Path(str(named)).stem, hash_weights(weights), load)


def _excluded(settings: Settings, record: Ingredient) -> bool:
    names = tuple(str(name) for name in settings["soup"]["exclude"])
    return bool(names) and (record.fingerprint.startswith(names) or record.short in names)


def _from_elsewhere(settings: Settings, pool: CheckpointPool, splits: Splits) -> tuple[list[Ingredient], list[str]]:
    """Sort checkpoints from elsewhere out; see `choose_members`."""
    skip = settings["soup"]["foreign"] == "skip"
    excluded = [str(name) for name in settings["soup"]["exclude"]]
    misfits = {name: why for name, why in pool.misfits.items() if name not in excluded}
    orders = pool.other_orders(splits.classes)
    members = [record for record in pool.ingredients() if not _excluded(settings, record)]
    orders = {record.short: orders[record.short] for record in members if record.short in orders}
    way_out = (
        f"Leave them out (soup.exclude=[{','.join([*misfits, *orders][:3])}], or soup.foreign=skip for all of them)"
    )
    if misfits and not skip:
        raise WeightsError(
            f"{len(misfits)} of the {len(misfits) + len(members)} checkpoints in {pool.url} cannot be averaged with the "
            f"others. {'; '.join(f'{name}: {why}' for name, why in list(misfits.items())[:3])} {way_out}."
        )
    if orders and not skip:
        name, recorded = next(iter(orders.items()))
        raise WeightsError(
            f"{len(orders)} of the {len(members)} checkpoints in {pool.url} have the classes in another order: {name} has "
            f"{_shown(recorded)}, the data have {_shown(splits.classes)}. Their heads answer other questions, so that an "
            f"average would be wrong for both. {way_out}, or reorder the rows of their heads."
        )
    members = [record for record in members if record.short not in orders]
    if not members:
        raise ConfigError(f"{pool.url} holds no checkpoint that fits the model and the data.")
    told = [f"{name} has the same weights as {first}: it counts once." for name, first in pool.copies.items()]
    if misfits or orders:
        told.append(f"{', '.join([*misfits, *orders])} left out: another architecture or order of classes.")
    return members, told


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _sort_out(settings: Settings, pool: Pool, splits: Splits | None = None) -> tuple[list[Ingredient], int]:
    """Return the ingredients that fit, and how many were looked at."""
    found = [record for record in pool.ingredients() if not _excluded(settings, record)]
    if not found:
        return [], 0
    splits = splits or build_splits(settings)
    start, weights = ensure_start(settings, splits)
    expected = {"start": start.weights, "architecture": start.architecture, "split": splits.hash()}
    problems: dict[str, list[str]] = {}
    for record in found:
        if differs := [key for key, value in expected.items() if getattr(record, key) != value]:
            problems[record.fingerprint] = [_how(key, record, start, weights, pool) for key in differs]
    if problems and settings["soup"]["foreign"] == "refuse":
        kinds = Counter("; ".join(reasons) for reasons in problems.values())
        lines = [
            f"{', '.join(name[:8] for name in problems if '; '.join(problems[name]) == kind)}: {kind}" for kind in kinds
        ]
        raise WeightsError(
            f"{len(problems)} of the {len(found)} ingredients in {pool.url} cannot be averaged with the others: "
            f"{' | '.join(lines)}. Use a pool for each task and start (pool.path=…), leave them out "
            f"(soup.exclude=[{','.join(name[:8] for name in list(problems)[:3])}], or soup.foreign=skip), or give the "
            f"settings they were made with."
        )
    return [record for record in found if record.fingerprint not in problems], len(found)


def _how(key: str, record: Ingredient, start: Ingredient, weights: Weights, pool: Pool) -> str:
    """Say how an ingredient differs, in settings where they are known."""
    if key == "architecture":
        with contextlib.suppress(WeightsError):
            if problem := describe_mismatch(weights, pool.weights(record.fingerprint)):
                return f"another architecture ({problem})"
        return "another architecture (tensors of other dtypes)"
    sections = ("data",) if key == "split" else ("model", "start", "loader")
    changes = [
        f"{name}.{leaf}: {record.config.get(name, {}).get(leaf)!r} there, {start.config[name].get(leaf)!r} here"
        for name in sections
        for leaf in sorted({*record.config.get(name, {}), *start.config[name]})
        if record.config.get(name, {}).get(leaf) != start.config[name].get(leaf)
        and not (name == "loader" and leaf != "size")
    ]
    what = {"split": "another split", "start": "another start"}[key]
    return f"{what} ({', '.join(changes) or 'its hash differs'})"
