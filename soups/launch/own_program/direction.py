"""The metric that selects, and whether larger or smaller values of it are better: said by the program, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf

from soups.errors import ConfigError
from soups.launch.own_program.interception import Fit

Mode = Literal["max", "min"]
_OBJECTIVES = (
    "optimized_metric",
    "objective_metric",
    "objective",
    "optimize_metric",
    "target_metric",
    "monitor_metric",
)
_DIRECTIONS: dict[str, Mode] = {"maximize": "max", "minimize": "min", "max": "max", "min": "min"}


@dataclass(frozen=True)
class Watcher:
    """Something in the program that watches a metric: a callback, a scheduler, or the objective of a search.

    Attributes:
        metric: its name.
        mode: which values it takes for better.
        source: what it is, for messages.
    """

    metric: str
    mode: Mode
    source: str


def choose_metric(
    named: str | None, mode: str | None, metrics: Mapping[str, float], fit: Fit, config: DictConfig
) -> tuple[str, Mode, list[str]]:
    """Return the metric that selects, its direction, and what to tell the user of the choice.

    Args:
        named: `ingredient.monitor`.
        mode: `ingredient.mode`.
        metrics: what `trainer.validate` logs.
        fit: of the program.
        config: composed, with Hydra's part.

    Raises:
        ConfigError: no metric is named or watched, validation does not log it, or nothing says which values are better.
    """
    watchers = [*of_callbacks(fit), *of_objective(config), *of_configuration(config)]
    metric = check_metric(metrics, named or next((watcher.metric for watcher in watchers), None))
    found: dict[Mode, Watcher] = {watcher.mode: watcher for watcher in reversed(watchers) if watcher.metric == metric}
    if not found and mode is None:  # configure_optimizers is called only where nothing else says it
        found = {watcher.mode: watcher for watcher in of_schedulers(fit) if watcher.metric == metric}
    if mode is not None:
        given = cast(Mode, mode)
        against = [watcher for key, watcher in found.items() if key != given]
        told = [
            f"{metric}: the {'largest' if given == 'max' else 'smallest'} value is taken for the best, as ingredient.mode="
            f"{given} says; {watcher.source} has mode={watcher.mode}."
            for watcher in against
        ]
        return metric, given, told
    if len(found) == 1:
        return metric, next(iter(found)), []
    if found:
        sources = " and ".join(f"{watcher.source} says {watcher.mode}" for watcher in found.values())
        raise ConfigError(
            f"The program contradicts itself about {metric}: {sources}. Say which: ++ingredient.mode=min|max."
        )
    raise ConfigError(
        f"Nothing in the program says whether larger or smaller values of {metric} are better: no checkpoint callback, early "
        f"stopping, scheduler or objective watches it, and its name proves nothing. Say it: ++ingredient.mode=min or "
        f"++ingredient.mode=max."
    )


def check_metric(metrics: Mapping[str, float], monitor: str | None) -> str:
    """Return the metric that selects.

    Raises:
        ConfigError: it is not named, or validation does not log it.
    """
    logged = ", ".join(metrics) or "nothing"
    if monitor is None:
        raise ConfigError(
            f"Which held-out metric selects the soup? Validation logs {logged}. Name one on the command line, "
            f"++ingredient.monitor={next(iter(metrics), 'val/acc')}, or in the configuration."
        )
    if monitor not in metrics:
        raise ConfigError(
            f"trainer.validate does not log {monitor!r}; it logs {logged}. Set ingredient.monitor to one."
        )
    return monitor


def of_callbacks(fit: Fit) -> list[Watcher]:
    """Return the metrics that callbacks watch, checkpoints first: any callback with a `monitor` and a `mode`."""
    own = fit.module.configure_callbacks() if hasattr(fit.module, "configure_callbacks") else []
    callbacks = [*fit.trainer.callbacks, *(own if isinstance(own, (list, tuple)) else [own])]
    checkpoints = [callback for callback in callbacks if hasattr(callback, "best_model_path")]
    found: list[Watcher] = []
    for callback in [*checkpoints, *(other for other in callbacks if other not in checkpoints)]:
        metric, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(metric, str) and mode in _DIRECTIONS:
            found.append(Watcher(metric, _DIRECTIONS[mode], f"the callback {type(callback).__name__}"))
    return found


def of_schedulers(fit: Fit) -> list[Watcher]:
    """Return the metrics that schedulers watch (ReduceLROnPlateau), as `configure_optimizers` returns them.

    Call it after a validation: the module then has a trainer, which `configure_optimizers` may ask for.
    """
    try:
        with fit.surroundings():
            returned: Any = fit.module.configure_optimizers()
    except Exception:  # it wants more than a validation has set up; another source has to say it
        return []
    found: list[Watcher] = []
    for entry in _scheduler_entries(returned):
        scheduler = entry.get("scheduler")
        mode = getattr(scheduler, "mode", None)
        if isinstance(entry.get("monitor"), str) and mode in _DIRECTIONS:
            found.append(Watcher(entry["monitor"], _DIRECTIONS[str(mode)], f"the scheduler {type(scheduler).__name__}"))
    return found


def _scheduler_entries(returned: Any) -> Iterator[dict[str, Any]]:
    """Yield each scheduler of what `configure_optimizers` returned, as a dict with "scheduler" and "monitor"."""
    if isinstance(returned, dict):
        whole = cast(dict[str, Any], returned)
        if "scheduler" in whole:
            yield whole
        elif (inner := whole.get("lr_scheduler")) is not None:
            entry = cast(dict[str, Any], inner) if isinstance(inner, dict) else {"scheduler": inner}
            yield {"monitor": whole.get("monitor"), **entry}
    elif isinstance(returned, (list, tuple)):
        for part in cast(list[Any], returned):
            yield from _scheduler_entries(part)


def of_objective(config: DictConfig) -> list[Watcher]:
    """Return the metric that a search of the program optimises, where its configuration names metric and direction.

    The direction is `hydra.sweeper.direction` (Optuna's) or a key `direction` beside the metric's name.
    """
    metric = next((config[name] for name in _OBJECTIVES if isinstance(config.get(name), str)), None)
    if metric is None:
        return []
    places = ("hydra.sweeper.direction", "direction", "optimization_direction", "optimize_direction")
    for place in places:
        direction = OmegaConf.select(config, place, default=None)
        name = getattr(direction, "name", direction)
        if isinstance(name, str) and name.lower() in _DIRECTIONS:
            return [Watcher(str(metric), _DIRECTIONS[name.lower()], f"{place}={name}")]
    return []


def of_configuration(config: DictConfig) -> list[Watcher]:
    """Return the metrics that sections of the configuration watch: any with `monitor` and `mode`.

    The mode may be that of a scheduler one section deeper, if that section names no metric of its own and no other scheduler
    there says otherwise. A `mode` of anything else (pooling, padding) says nothing.
    """
    found: list[Watcher] = []

    def walk(section: Mapping[str, Any], place: str) -> None:
        metric = section.get("monitor")
        inner = {key: cast(Mapping[str, Any], part) for key, part in section.items() if isinstance(part, Mapping)}
        parts = {place: section} if "mode" in section else {}
        parts = parts or {f"{place}.{key}".lstrip("."): part for key, part in inner.items() if _is_scheduler(key, part)}
        for where, part in parts.items():
            if isinstance(metric, str) and part.get("mode") in _DIRECTIONS and place != "ingredient":
                found.append(
                    Watcher(metric, _DIRECTIONS[str(part["mode"])], f"the configuration's {where}".rstrip(" "))
                )
        for key, part in section.items():
            if isinstance(part, Mapping):
                walk(cast(Mapping[str, Any], part), f"{place}.{key}".lstrip("."))

    plain = OmegaConf.to_container(_without_hydra(config), resolve=False)
    walk(_resolved_texts(cast(dict[str, Any], plain), config), "")
    return found


def _is_scheduler(key: str, section: Mapping[str, Any]) -> bool:
    """Tell whether a section of the configuration describes a scheduler that watches the metric of the section around it."""
    target = str(section.get("_target_", "")).rpartition(".")[2]
    named = "sched" in key.lower() or "plateau" in f"{key} {target}".lower()
    return named and "monitor" not in section


def _without_hydra(config: DictConfig) -> DictConfig:
    copy = config.copy()
    OmegaConf.set_struct(copy, False)
    copy.pop("hydra", None)
    return copy


def _resolved_texts(tree: dict[str, Any], config: DictConfig, place: str = "") -> dict[str, Any]:
    """Return the tree with `monitor` and `mode` resolved, which may be interpolations."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        inner = f"{place}.{key}".lstrip(".")
        if isinstance(value, dict):
            result[key] = _resolved_texts(cast(dict[str, Any], value), config, inner)
        elif key in ("monitor", "mode") and isinstance(value, str) and "${" in value:
            select: Callable[..., Any] = OmegaConf.select
            try:
                result[key] = select(config, inner)
            except Exception:  # an interpolation of the run; it names no metric
                result[key] = None
        else:
            result[key] = value
    return result
