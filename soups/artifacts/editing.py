"""Artifacts with a task more, or a task less: the same bytes as if they had been packed so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from soups.artifacts.header import Header, name_of
from soups.artifacts.method import PartMethod
from soups.artifacts.packing import check_experts, encoded, keys_of, origin_of, planned
from soups.errors import ConfigError, did_you_mean
from soups.stores import FileWriter, Store, TensorMeta

_PIECE = 1 << 22


def check_independent(method: PartMethod, header: Header, what: str) -> None:
    """Check that a task's part depends on that task alone.

    Raises:
        ConfigError: the shared part mixes tasks.
    """
    if not method.independent:
        raise ConfigError(
            f"The shared part that {header.method} makes depends on all tasks, so {what} needs the experts again: pack them."
        )


def write_without(
    file: Store, header: Header, method: PartMethod, task: str, out: str | os.PathLike[str], *, overwrite: bool
) -> Path:
    """Write an artifact that never had a task.

    Raises:
        ConfigError: there is no such task, no other one, or the shared part mixes tasks.
    """
    check_independent(method, header, "removing one")
    if task not in header.tasks:
        raise ConfigError(f"{file.location} has no task {task!r}; {did_you_mean(task, list(header.tasks))}")
    if len(header.tasks) == 1:
        raise ConfigError(f"{task!r} is the only task of {file.location}. Delete the file instead.")
    prefix = name_of(task, "", "").rstrip("/") + "/"
    plan = {name: file.meta(name) for name in file if not name.startswith(prefix)}
    tasks = {name: origin for name, origin in header.tasks.items() if name != task}
    changed = header.model_copy(update={"tasks": tasks})
    with FileWriter(Path(out), plan, metadata=changed.metadata(), overwrite=overwrite) as writer:
        _copy(file, plan, writer)
    return Path(out)


def write_with(
    file: Store,
    header: Header,
    method: PartMethod,
    task: str,
    expert: Store,
    base: Store,
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
) -> Path:
    """Write an artifact with one more task, the last.

    Raises:
        ConfigError: there is such a task already, or the shared part mixes tasks.
        WeightsError: the expert does not fit the base model.
    """
    check_independent(method, header, "adding one")
    if task in header.tasks or not task or "/" in task:
        raise ConfigError(f"{file.location} has a task {task!r} already, or that is no name for one. Choose another.")
    check_experts(base, {task: expert})
    new = planned(method, base, {task: expert})
    kept = {name: file.meta(name) for name in file}
    order: dict[str, list[str]] = {key: [] for key in keys_of(base)}
    for name in (*kept, *(name for name in new if name not in kept)):
        order[_tensor_of(name)].append(name)
    plan = {name: kept.get(name) or new[name] for names in order.values() for name in names}
    changed = header.model_copy(update={"tasks": {**header.tasks, task: origin_of(expert)}})
    with FileWriter(Path(out), plan, metadata=changed.metadata(), overwrite=overwrite) as writer:
        _copy(file, kept, writer)
        for name, (start, values) in encoded(method, base, {task: expert}):
            if name not in kept:
                writer.write_flat(name, start, values)
    return Path(out)


def _tensor_of(name: str) -> str:
    inner = name.partition("/")[2] if name.startswith("shared/") else name.split("/", 2)[2]
    return inner.rpartition("/")[0]


def _copy(file: Store, plan: Mapping[str, TensorMeta], writer: FileWriter) -> None:
    for name, meta in plan.items():
        for start in range(0, meta.numel, _PIECE):
            writer.write_flat(name, start, file.read_flat(name, start, min(start + _PIECE, meta.numel)))
