"""The sweep behind `+soup=…`: which ingredients are wanted, which are there, and who makes the rest."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from soups.errors import ConfigError, RunError, SoupError
from soups.fitting.environment import refuse_sweeps_in_ranks
from soups.fitting.quiet import quiet
from soups.fitting.run import Run, run_of, shared
from soups.fitting.spec import fingerprint
from soups.launch.app import finish
from soups.launch.failures import Failed, leave, reasons
from soups.launch.hydra_errors import check_hydra, keys_of, unknown_setting
from soups.launch.ignored import refuse_ignored, refuse_swept_layout
from soups.launch.progress import SweepProgress
from soups.launch.search_space import expand, parse_space, split_arguments
from soups.launch.settings import UserError, configuration_of
from soups.soup_making.ingredients import from_elsewhere, refuse_foreign
from soups.soup_making.soup import options_of_run
from soups.stores.pool import Ingredient, Pool


@dataclass(frozen=True)
class Wanted:
    """An ingredient the sweep asks for: its fingerprint, the overrides that make it, and those that tell it apart."""

    fingerprint: str
    overrides: list[str]
    label: str


def run_sweep(
    config: DictConfig, context: HydraContext, launcher: Launcher, arguments: Sequence[str]
) -> Sequence[JobReturn]:
    """Run a sweep that ends in a soup.

    Raises:
        UserError: a mistake in settings, data or pool; all ingredients failed.
        SystemExit: 3, after the soup, when some ingredients failed.
    """
    quiet()
    try:
        refuse_sweeps_in_ranks()
        check_hydra(config.hydra)
        fixed, points = plan(config, arguments)
        run = run_of(configuration_of(compose_one(context.config_loader.load_sweep_config, config, fixed)))
        options = options_of_run(run)
        refuse_ignored(arguments, run.configuration, lambda: run.splits)
        with shared(run):
            if from_elsewhere(run):
                results, failed = [], {}
            else:
                wanted = wanted_ingredients(run, config, context, fixed, points)
                refuse_foreign(run, options)
                results, failed = run_missing(run.pool, wanted, launcher)
            code = finish(run, failed)
    except SoupError as error:
        raise UserError(f"\n{error}") from error
    leave(code)
    return results


def compose_one(
    load: Callable[..., DictConfig], config: DictConfig, overrides: list[str], hydra: bool = False
) -> DictConfig:
    """Compose the configuration of one job, without Hydra's own part unless `hydra`.

    Raises:
        ConfigError: a key does not exist, or a value does not fit.
    """
    try:
        composed = load(config, overrides)
    except HydraException as error:
        if found := unknown_setting(error):
            raise found from error
        reason = " ".join(str(part) for part in (error, error.__cause__) if part)
        raise ConfigError(
            f"A setting of the sweep does not exist: {reason} Check sweep.space and the command line for a misspelt "
            f"key; `--cfg job` prints all there are."
        ) from error
    if not hydra:
        OmegaConf.set_struct(composed, False)
        composed.pop("hydra", None)
    return composed


def plan(config: DictConfig, arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that hold for all ingredients, and those of each.

    What the command line says of a key wins over the search space: a value fixes it, a sweep replaces it.
    """
    given_sweep: Any = OmegaConf.to_container(config.sweep, resolve=True) if config.get("sweep") else {}
    sweep: Any = {"method": "random", "size": 8, "seed": 0, "space": {}, **given_sweep}
    unknown = set(sweep) - {"method", "size", "seed", "space"}
    if unknown:
        raise ConfigError(f"sweep.{min(unknown)} is unknown; there are sweep.method, .size, .seed and .space.")
    fixed, swept, given = split_arguments(arguments)
    # An entry that was swept itself is in the configuration as Hydra's description of that sweep.
    replaced = {key for key in swept if f"sweep.space.{key}" in keys_of(arguments)}
    entries = _leaves(sweep["space"] or {}, replaced)
    space = parse_space({key: text for key, text in entries if key not in given})
    space.update(swept)
    if not isinstance(sweep["size"], int) or sweep["size"] < 0:
        raise ConfigError(f"sweep.size={sweep['size']} must be a whole number of at least 0.")
    if sweep["size"] == 0:
        return fixed, []
    return fixed, expand(space, sweep["method"], sweep["size"], int(sweep["seed"]))


def _leaves(space: Mapping[str, Any], left_out: Container[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a nested search space as dotted keys and their texts; null takes a key out."""
    for name, value in space.items():
        key = f"{prefix}{name}"
        if key in left_out:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(cast(Mapping[str, Any], value), left_out, f"{key}.")
        elif value is not None:
            yield key, value


def wanted_ingredients(
    run: Run, config: DictConfig, context: HydraContext, fixed: list[str], points: list[list[str]]
) -> list[Wanted]:
    """Return the ingredients that the points of a search space stand for, each once.

    Every point is checked before anything is computed for the first.

    Args:
        run: of the settings that all have in common.
        config: the sweep's, as Hydra composed it.
        context: Hydra's.
        fixed: overrides that hold for all.
        points: overrides of each.

    Raises:
        ConfigError: a key of the search space does not exist, decides no weights, or would give ingredients that cannot be
            averaged; or a value does not fit.
    """
    keys = list(dict.fromkeys(text.partition("=")[0].lstrip("+") for point in points for text in point))
    refuse_swept_layout(keys, run.configuration)
    refuse_ignored([f"{key}=null" for key in keys], run.configuration, lambda: run.splits)
    load = context.config_loader.load_sweep_config
    runs = [run_of(configuration_of(compose_one(load, config, [*fixed, *point]))) for point in points]
    for own, point in zip(runs, points, strict=True):
        if not own.shares_base_model(run):
            raise ConfigError(
                f"An ingredient of this sweep ({label(point)}) would have another base model or other data than the rest, "
                f"and could not be averaged with them. Sweep settings of the fine-tuning alone; model, data, start, input "
                f"size and settings of the shared epochs (start.epochs > 0) are the same for all."
            )
    wanted: dict[str, Wanted] = {}
    for own, point in zip(runs, points, strict=True):
        name = fingerprint(own.spec)
        wanted.setdefault(name, Wanted(name, [*fixed, *point], label(point)))
    return list(wanted.values())


def label(point: Sequence[str]) -> str:
    """Return the overrides of one ingredient for people, without the sections of their keys."""
    pairs = (text.partition("=") for text in point)
    return " ".join(f"{key.lstrip('+').rpartition('.')[2]}={value}" for key, _, value in pairs)


def run_missing(
    pool: Pool,
    wanted: list[Wanted],
    launcher: Launcher,
    describe: Callable[[Ingredient], str] = lambda record: f"held-out {record.heldout():.2%}",
) -> tuple[Sequence[JobReturn], dict[str, Failed]]:
    """Launch the ingredients that the pool lacks; return the launcher's results and why each failed one failed.

    Args:
        pool: where they are wanted.
        wanted: all that the sweep asks for.
        launcher: Hydra's.
        describe: what is said of a finished one.

    Raises:
        RunError: all failed, or the launcher died.
    """
    console = Console(stderr=True)
    missing = [item for item in wanted if item.fingerprint not in pool]
    found = len(wanted) - len(missing)
    counts = f": {found} of {len(wanted)} ingredients found, {len(missing)} to fine-tune."
    console.print(Text.assemble("Pool ", (pool.url, "bold"), counts), soft_wrap=True)
    if not missing:
        return [], {}
    results: Sequence[JobReturn] = []
    crash: Exception | None = None
    labels = {item.fingerprint: item.label for item in missing}
    with SweepProgress(pool, list(labels), labels, found, describe=describe).running():
        try:
            results = launcher.launch([item.overrides for item in missing], initial_job_idx=0)
        except SoupError:
            raise
        except Exception as error:  # a launcher's own death (a killed worker, a lost cluster) keeps finished work
            crash = error
    errors = {
        item.fingerprint: str(getattr(result, "_return_value", ""))
        for item, result in zip(missing, results, strict=False)
        if result.status == JobStatus.FAILED
    }
    failed: dict[str, Failed] = {}
    for item in missing:
        if item.fingerprint in pool and item.fingerprint in errors:
            # Its weights are safe; what failed came after them (tracking, most often) and must not pass in silence.
            finished = (f"Ingredient {item.fingerprint[:8]} is finished, but:", "yellow")
            console.print(Text.assemble(finished, f" {errors[item.fingerprint]}"))
        if item.fingerprint not in pool:
            failure = pool.failure(item.fingerprint)
            why = failure.error if failure else errors.get(item.fingerprint, str(crash or "it left no result"))
            failed[item.fingerprint] = Failed(item.label, why.strip())
    if crash is not None:
        raise RunError(
            f"The launcher stopped: {type(crash).__name__}: {crash}. {len(missing) - len(failed)} of {len(missing)} "
            f"ingredients are finished and kept; run the same command again for the rest."
        ) from crash
    if failed and len(failed) == len(wanted):
        raise RunError(f"All {len(failed)} ingredients failed, so there is no soup. {'; '.join(reasons(failed))}")
    return results, failed
