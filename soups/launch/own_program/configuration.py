"""The settings of a program that is not ours: our sections in it, and what of the rest decides an ingredient's weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from soups.errors import ConfigError, did_you_mean
from soups.stores.files import fingerprint as hash_json

# Raise it when a change of this code changes the weights that the same program and configuration give.
PROGRAM_VERSION = 2
# Our keys, by section. A program may have sections of these names with other keys in them, which are its own.
KEYS: dict[str, tuple[str, ...]] = {
    "ingredient": ("monitor", "mode", "weights", "fit", "ignore", "start", "data", "varied"),
    "pool": ("path",),
}
# Our keys that users set; the sweep sets the others.
_PUBLIC = ("monitor", "mode", "weights", "fit", "ignore")
# Sections that are ours as a whole, and Hydra's.
_OURS = ("hydra", "soup", "sweep")
# Sections and keys that say where things are kept and logged.
_ELSEWHERE = ("paths", "logger", "loggers", "trainer.logger")
_PLACES = ("default_root_dir", "dirpath", "output_dir", "log_dir", "save_dir")
_LOGGER = re.compile(r"(^|\.)loggers?\.|Logger$")


def is_ours(config: DictConfig) -> bool:
    """Tell whether a configuration was made from `conf/train.yaml`, or belongs to another program."""
    return all(section in config for section in ("start", "loader", "task"))


@dataclass(frozen=True)
class ProgramSpec:
    """What decides the weights of an ingredient of somebody's program, as far as a configuration can say: not its code.

    Attributes:
        config: the program's configuration without our own keys, paths and loggers.
        weights: what a fit leaves: "raw", "best" or the name of an average.
        fit: which call of `trainer.fit` counts.
        start: hash of the weights that all ingredients start from; empty until they are known.
        data: digest of the validation data; empty until it is known.
    """

    config: Mapping[str, Any]
    weights: str
    fit: str
    start: str
    data: str

    def determinants(self) -> dict[str, Any]:
        """Return what the fingerprint is made of."""
        return {
            "program_version": PROGRAM_VERSION,
            "start": self.start,
            "data": self.data,
            "weights": self.weights,
            "fit": self.fit,
            "config": dict(self.config),
        }


@dataclass(frozen=True)
class Program:
    """The settings of one ingredient.

    Attributes:
        monitor: the metric that selects; None until the trainer was seen.
        mode: "max" or "min"; None until the trainer was seen.
        spec: what decides the weights.
        pool: where ingredients are kept, an absolute path or a URL.
        varied: keys that the sweep varies; they always count.
    """

    monitor: str | None
    mode: Literal["max", "min"] | None
    spec: ProgramSpec
    pool: str
    varied: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @staticmethod
    def of(config: DictConfig, job: str, given: Sequence[str] = (), varied: Sequence[str] = ()) -> Program:
        """Read a composed configuration.

        Args:
            config: of the program, without Hydra's part.
            job: its name, for the default pool.
            given: keys that the command line adds to the program's configuration.
            varied: keys that the sweep varies.

        Raises:
            ConfigError: an unknown key or value of ours, or a sweep over one.
        """
        section, pool = _section(config, "ingredient"), _section(config, "pool")
        for name, values in (("ingredient", section), ("pool", pool)):
            _check_keys(name, values, given)
        for key in varied:
            if key.partition(".")[0] in _OURS or (key in _our_keys() and key != "ingredient.weights"):
                raise ConfigError(f"{key} cannot vary within a sweep: one command has one of it. Give it one value.")
        mode = section.get("mode")
        if mode not in (None, "min", "max"):
            raise ConfigError(f"ingredient.mode={mode}: {did_you_mean(str(mode), ('min', 'max'))}")
        fit = str(section.get("fit") or "last")
        if fit != "last" and not (fit.isdigit() and int(fit) > 0):
            raise ConfigError(
                f"ingredient.fit={fit} must be `last`, or the number of the call of trainer.fit that counts, from 1."
            )
        varied = tuple(varied) or tuple(str(key) for key in section.get("varied") or ())
        ignored = tuple(str(key) for key in section.get("ignore") or ())
        spec = ProgramSpec(
            config=_determined(config, ignored, varied),
            weights=str(section.get("weights") or "raw"),
            fit=fit,
            start=str(section.get("start") or ""),
            data=str(section.get("data") or ""),
        )
        place = str(pool.get("path") or f"pools/{job}")
        return Program(section.get("monitor"), mode, spec, _absolute(place), varied, ignored)

    @property
    def fingerprint(self) -> str:
        """The ingredient's name in the pool."""
        return hash_json(self.spec.determinants())

    def on(self, start: str, data: str, monitor: str, mode: Literal["max", "min"]) -> Program:
        """Return the settings with the findings of the rehearsal."""
        return replace(self, spec=replace(self.spec, start=start, data=data), monitor=monitor, mode=mode)

    def overrides(self) -> list[str]:
        """Return the overrides that hand the findings of the rehearsal to a job."""
        values = {
            "ingredient.start": self.spec.start,
            "ingredient.data": self.spec.data,
            "ingredient.monitor": self.monitor,
            "ingredient.mode": self.mode,
            "pool.path": self.pool,
        }
        varied = ",".join(quoted(key) for key in self.varied)
        return [*(f"++{key}={quoted(str(value))}" for key, value in values.items()), f"++ingredient.varied=[{varied}]"]


def quoted(text: str) -> str:
    """Return a text as a value of Hydra's override grammar."""
    escaped = re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'")
    return f"'{escaped}'"


def _our_keys() -> set[str]:
    return {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}


def _section(config: DictConfig, name: str) -> dict[str, Any]:
    """Return our keys of a section, resolved, and the names of the others."""
    found = config.get(name) if name in config else None
    if not isinstance(found, DictConfig):
        return {}
    try:
        return {
            str(key): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value := found[key]) else value
            for key in found
            if key in KEYS[name]
        } | {str(key): None for key in found if key not in KEYS[name]}
    except OmegaConfBaseException as error:
        raise ConfigError(f"The section {name} of the configuration cannot be resolved: {error}") from error


def _check_keys(name: str, values: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse a misspelt key of ours: one that the command line adds to a section of ours, or one that resembles ours.

    A program may have a section `pool` or `ingredient` of its own, whose other keys are its own business.
    """
    public = [key for key in KEYS[name] if name != "ingredient" or key in _PUBLIC]
    theirs = [key for key in values if key not in KEYS[name]]
    typed = {key.removeprefix(f"{name}.") for key in given if key.startswith(f"{name}.")}
    own_section = bool(set(theirs) - typed)
    for key in theirs:
        hint = did_you_mean(key, public)
        if hint.startswith("did you mean") or (key in typed and not own_section):
            raise ConfigError(f"{name}.{key} is unknown: {hint}")


def _absolute(place: str) -> str:
    """Return a folder as an absolute path: jobs may run in other folders (hydra.job.chdir). URLs stay as they are."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _determined(config: DictConfig, ignored: Sequence[str], varied: Sequence[str]) -> dict[str, Any]:
    """Return the configuration without our own keys, paths and loggers; keys that the sweep varies always stay."""
    everything = _resolved(config, varied)
    kept: dict[str, Any] = {}
    dropped = [*_OURS, *_our_keys(), *_ELSEWHERE, *ignored]
    for path, value, loggers in _leaves(everything):
        key = ".".join(path)
        out = loggers or path[-1] in _PLACES or any(key == drop or key.startswith(f"{drop}.") for drop in dropped)
        if out and not any(key == name or key.startswith(f"{name}.") for name in varied):
            continue
        branch = kept
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = value
    return kept


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = (), logger: bool = False
) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Yield every value with its path, and whether it belongs to a logger; an empty section is a value."""
    logger = logger or bool(_LOGGER.search(str(tree.get("_target_", ""))))
    for key, value in tree.items():
        place = (*path, str(key))
        if isinstance(value, Mapping) and value:
            yield from _leaves(cast(Mapping[str, Any], value), place, logger)
        else:
            yield place, value, logger


def _resolved(config: DictConfig, varied: Sequence[str]) -> dict[str, Any]:
    """Return the configuration as plain values, the same for every run of it.

    Interpolations are resolved, except where a value depends on the run (Hydra's folder, the time) or cannot be resolved
    here: those stay as they are written. Paths that do not vary are replaced by their keys, so that a folder may move.
    """
    first, second = _resolve_once(config, varied, "1"), _resolve_once(config, varied, "2")
    return cast(dict[str, Any], _agreed(first, second, OmegaConf.to_container(config, resolve=False)))


def _agreed(first: Any, second: Any, written: Any) -> Any:
    if isinstance(first, dict) and isinstance(second, dict) and isinstance(written, dict):
        pairs = cast(dict[str, Any], written)
        return {str(key): _agreed(first.get(key), second.get(key), pairs[key]) for key in pairs}
    if isinstance(first, list) and isinstance(second, list) and isinstance(written, list):
        parts = cast(list[Any], written)
        return [_agreed(a, b, c) for a, b, c in zip(first, second, parts, strict=False)]
    agreed = first if type(first) is type(second) and (first == second or first != first) else written
    return _plain(agreed)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(list[Any], value)]
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)


def _resolve_once(config: DictConfig, varied: Sequence[str], mark: str) -> Any:
    """Resolve every value by itself, with marks in place of paths and of what depends on the run."""
    copy = config.copy()
    OmegaConf.set_struct(copy, False)
    OmegaConf.set_readonly(copy, False)
    if isinstance(paths := copy._get_node("paths"), DictConfig):  # pyright: ignore[reportPrivateUsage]
        for key in list(paths):
            if f"paths.{key}" not in varied:
                paths[key] = f"<paths.{key}>"
    with _run_resolvers(mark):
        return _values(copy)


def _values(node: Any) -> Any:
    if isinstance(node, DictConfig):
        if node._is_none() or node._is_missing():  # pyright: ignore[reportPrivateUsage]
            return None if node._is_none() else "???"  # pyright: ignore[reportPrivateUsage]
        return {str(key): _value(node, key) for key in node}
    if isinstance(node, ListConfig):
        if node._is_none() or node._is_missing():  # pyright: ignore[reportPrivateUsage]
            return None
        return [_value(node, place) for place in range(len(node))]
    return node


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        return _values(node[key])
    except (
        Exception
    ):  # a missing value, or a resolver of the program that fails here: the value counts as it is written
        child: Any = cast(Any, node)._get_node(key)
        return child._value() if child is not None else None


@contextlib.contextmanager
def _run_resolvers(mark: str) -> Generator[None]:
    """Within the block, Hydra's resolvers and the time give marks instead of values of this run."""
    resolvers = BaseContainer._resolvers  # pyright: ignore[reportPrivateUsage]
    before = dict(resolvers)
    try:
        for name in ("hydra", "now"):
            OmegaConf.register_new_resolver(name, lambda *_, mark=mark: f"<run {mark}>", replace=True)
        yield
    finally:
        resolvers.clear()
        resolvers.update(before)
