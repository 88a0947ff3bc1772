"""What of a program's configuration decides an ingredient's weights: everything but our own keys, paths and loggers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer

# Our keys, by section. A program may have sections of these names with other keys in them, which are its own.
KEYS: dict[str, tuple[str, ...]] = {
    "ingredient": ("monitor", "mode", "weights", "fit", "ignore", "start", "data", "varied"),
    "pool": ("path",),
}
# Sections that are ours as a whole, and Hydra's.
OURS = ("hydra", "soup", "sweep")
# Sections and keys that say where things are kept and logged.
_ELSEWHERE = ("paths", "logger", "loggers", "trainer.logger")
_PLACES = ("default_root_dir", "dirpath", "output_dir", "log_dir", "save_dir")
_LOGGER = re.compile(r"(^|\.)loggers?\.|Logger$")


def our_keys() -> set[str]:
    """Return our keys with their sections."""
    return {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}


def determined(config: DictConfig, ignored: Sequence[str], varied: Sequence[str]) -> dict[str, Any]:
    """Return the configuration without our own keys, paths and loggers; keys that the sweep varies always stay."""
    everything = _resolved(config, varied)
    kept: dict[str, Any] = {}
    dropped = [*OURS, *our_keys(), *_ELSEWHERE, *ignored]
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
