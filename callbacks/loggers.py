"""Loggers for the time in which user code runs once more: the same names with a suffix, or nothing at all."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from .quiet import replaced

Rename = Callable[[str], str]

# Names that are an axis, not a metric.
_AXES = ("step", "epoch")


def renamed(values: Mapping[Any, Any], rename: Rename) -> dict[Any, Any]:
    """Return a mapping with its string keys renamed; `step` and `epoch` keep their names."""
    return {rename(key) if isinstance(key, str) and key not in _AXES else key: item for key, item in values.items()}


class Renaming:
    """Stands in for a logger, or for the object of a tracking library inside it: values get other names.

    Whatever else would be written is left out, and a warning says so once. It passes for an object of the class it stands in
    for.

    Args:
        inner: the logger.
        rename: from a metric's name to the name that is written; None to write nothing.
    """

    def __init__(self, inner: Any, rename: Rename | None) -> None:
        self._inner = inner
        self._rename = rename

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._inner)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name == "experiment" or name in ("run", "summary"):
            return Renaming(value, self._rename)
        if not callable(value) or name.startswith("get"):
            return value
        return self._call(name, value)

    def _call(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            rename = self._rename
            if rename is None:
                return None
            values = args[0] if args else next(iter(kwargs.values()), None)
            # `add_scalar(tag, …)` of TensorBoard; `log(values)`, `log_metrics(values, step)` of all others.
            if isinstance(values, Mapping) and name in ("log", "log_metrics", "log_dict", "update", "track"):
                changed = renamed(values, rename)
            elif isinstance(values, str) and (
                name.startswith("add_") or name in ("log_metric", "log_image", "log_table")
            ):
                changed = rename(values)
            else:
                if name not in ("save", "flush", "close", "finalize", "watch"):
                    _warn_of(type(self._inner).__name__, name)
                return None
            if args:
                return method(changed, *args[1:], **kwargs)
            first = next(iter(kwargs))
            return method(**{**kwargs, first: changed})

        return call


_warned: set[tuple[str, str]] = set()


def _warn_of(owner: str, name: str) -> None:
    if (owner, name) not in _warned:
        _warned.add((owner, name))
        warnings.warn(
            f"{owner}.{name}(…) was called while an average is evaluated beside the raw weights. It cannot be written under "
            f"the average's name and was left out; metrics logged with self.log or logger.log_metrics are not affected.",
            stacklevel=3,
        )


@contextmanager
def loggers_replaced(trainer: Any, rename: Rename | None) -> Generator[list[Any]]:
    """Within the block whatever user code logs by hand gets other names, or is left out; yields the loggers themselves."""
    real = list(trainer.loggers)
    with ExitStack() as stack:
        stack.enter_context(replaced(trainer, _loggers=[Renaming(logger, rename) for logger in real]))
        wandb: Any = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            stack.enter_context(replaced(wandb, log=Renaming(wandb.run, rename).log))
        yield real
