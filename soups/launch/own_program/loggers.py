"""Loggers of somebody's program: muted where nothing is trained, and one W&B run for each ingredient."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Generator
from importlib.util import find_spec
from typing import Any

from soups.launch.own_program.interception import packages

# Methods of a logger that write somewhere; beside them everything that begins with "log".
_WRITING = ("save", "finalize", "after_save_checkpoint", "watch", "unwatch", "use_artifact")


class _NoExperiment:
    """Stands for a logger's experiment: every attribute and item can be called, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NoExperiment()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return None

    def __len__(self) -> int:
        return 0

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


@contextlib.contextmanager
def muted_loggers() -> Generator[None]:
    """Within the block, loggers of all kinds are there and write nothing: no run, no file, no connection."""
    changed: list[tuple[type, str, Any]] = []
    for kind in _kinds():
        for name, member in list(vars(kind).items()):
            silent: Any = None
            if name == "experiment" and isinstance(member, property):
                silent = property(lambda self: _NoExperiment())
            elif inspect.isfunction(member) and (name.startswith("log") or name in _WRITING):
                silent = _nothing
            if silent is not None:
                changed.append((kind, name, member))
                setattr(kind, name, silent)
    wandb: Any = sys.modules.get("wandb")
    start = getattr(wandb, "init", None)
    mode = os.environ.get("WANDB_MODE")
    if start is None:
        os.environ["WANDB_MODE"] = "disabled"
    else:
        wandb.init = lambda *arguments, **named: start(*arguments, **{**named, "mode": "disabled"})
    try:
        yield
    finally:
        for kind, name, member in changed:
            setattr(kind, name, member)
        if start is not None:
            wandb.init = start
        elif mode is None:
            os.environ.pop("WANDB_MODE", None)
        else:
            os.environ["WANDB_MODE"] = mode


def _kinds() -> list[type]:
    """Return every logger class that is known by now, of both packages and of the program, and their bases."""
    found: dict[type, None] = {}
    waiting: list[type] = [importable.loggers.Logger for importable in packages()]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found[kind] = None
            waiting += kind.__subclasses__()
    bases = dict.fromkeys(base for kind in found for base in kind.__mro__)  # Lightning's loggers inherit from Fabric's
    return [base for base in bases if base.__module__ not in ("builtins", "abc", "typing")]


@contextlib.contextmanager
def own_run(group: str, tracked: bool) -> Generator[None]:
    """Within the block a program's W&B logger starts a run of its own, in a group, which ends with the block.

    Args:
        group: of the runs of one sweep; a group that the program names itself stays.
        tracked: the program's configuration names W&B, so that it is imported before the program does so.
    """
    if tracked and find_spec("wandb") is not None:
        importlib.import_module("wandb")
    before = _current_run()
    named = os.environ.get("WANDB_RUN_GROUP")
    os.environ["WANDB_RUN_GROUP"] = named or group
    wandb: Any = sys.modules.get("wandb")
    start = getattr(wandb, "init", None)

    def init(*arguments: Any, **options: Any) -> Any:
        assert start is not None
        return start(*arguments, **{**options, "group": options.get("group") or named or group})

    if start is not None:
        wandb.init = init
    code = 1
    try:
        yield
        code = 0
    finally:
        if start is not None:
            wandb.init = start
        if named is None:
            os.environ.pop("WANDB_RUN_GROUP", None)
        run = _current_run()
        if run is not None and run is not before:
            run.finish(exit_code=code)


def _current_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
