"""Somebody's own train.py as the maker of ingredients: `+soup=greedy` in any Hydra and Lightning program.

Nothing is changed in the program. While the sweep runs its task function, `trainer.fit` is taken over (`fits_go_to`): the
module gets the weights that all ingredients start from, the fit runs, and what it leaves goes into the pool with what
`trainer.validate` says of it. The soup is then chosen by the same `trainer.validate`, and shown by `trainer.test`.

What the program's configuration may say, all optional::

    ingredient:
      monitor: val/acc   # metric of trainer.validate that selects; default: what its ModelCheckpoint or EarlyStopping watches
      mode: max          # or min; default: theirs, or min for names with "loss" or "error"
      weights: raw       # what a fit leaves: raw, best (checkpoint), or the name of an average (with callbacks=[ema]: ema)
      ignore: [data.num_workers]   # more keys that do not decide the weights
    pool: {path: pools/mine}       # a folder or an fsspec URL
    sweep: {method: random, size: 8, seed: 0, space: {model: {lr: "tag(log, interval(1e-4, 1e-2))"}}}
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from soups.errors import ConfigError, RunError, SoupError, WeightsError, did_you_mean
from soups.launch.fits import Evaluation, Fit, finished_weights, fits_go_to, monitor_of
from soups.launch.progress import ReportProgress
from soups.launch.quiet import quiet
from soups.launch.settings import LAYOUT, UserError, launched_outside, versions
from soups.launch.training import layout
from soups.seeding import derive_seed
from soups.stores.files import fingerprint
from soups.stores.pool import Failure, Ingredient, Pool
from soups.weights import hash_architecture, hash_weights
from soups.worker import Message, run_in_processes

# Raise it when a change of this code changes the weights that the same program and configuration give.
PROJECT_VERSION = 1
# Parts of a configuration that say where things are kept and shown.
_ELSEWHERE = (
    "hydra",
    "soup",
    "sweep",
    "pool",
    "ingredient",
    "paths",
    "tracking",
    "logger",
    "loggers",
    "extras",
    "tags",
)
_KEYS = ("monitor", "mode", "weights", "ignore", "start")


def is_ours(config: DictConfig) -> bool:
    """Tell whether a configuration was made from `conf/train.yaml`, or belongs to a program that is not ours."""
    return all(section in config for section in ("start", "loader", "task"))


@dataclass(frozen=True)
class Project:
    """What the sweep knows of somebody's program.

    Attributes:
        monitor: the metric that selects; None until the trainer was seen.
        mode: "max" or "min".
        weights: "raw", "best" or the name of an average.
        start: hash of the weights that all ingredients start from; empty until they are known.
        pool: where ingredients are kept.
        determined: the configuration without what does not decide the weights, interpolations as they are written.
    """

    monitor: str | None
    mode: str | None
    weights: str
    start: str
    pool: str
    determined: dict[str, Any] = field(default_factory=dict[str, Any])

    @staticmethod
    def of(config: DictConfig, job: str) -> Project:
        """Read a composed configuration.

        Args:
            config: of the program.
            job: its name, for the default pool.

        Raises:
            ConfigError: an unknown key or value in the `ingredient` section.
        """
        section: dict[str, Any] = _plain(config, "ingredient")
        if unknown := sorted(set(section) - set(_KEYS)):
            raise ConfigError(f"ingredient.{unknown[0]} is unknown: {did_you_mean(unknown[0], _KEYS[:-1])}")
        if section.get("mode") not in (None, "min", "max"):
            raise ConfigError(
                f"ingredient.mode={section['mode']}: {did_you_mean(str(section['mode']), ('min', 'max'))}"
            )
        everything: dict[str, Any] = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
        ignored = [*_ELSEWHERE, *(f"trainer.{name}" for name in LAYOUT), *(section.get("ignore") or [])]
        for key in ignored:
            _remove(everything, str(key).split("."))
        weights = str(section.get("weights") or "raw")
        return Project(
            monitor=section.get("monitor"),
            mode=section.get("mode"),
            weights=weights,
            start=str(section.get("start") or ""),
            pool=str(_plain(config, "pool").get("path") or f"pools/{job}"),
            determined={**everything, "ingredient": {"weights": weights}},
        )

    @property
    def determinants(self) -> dict[str, Any]:
        """What decides an ingredient's weights, as far as a configuration can say: not the code, not the data's content."""
        return {"project_version": PROJECT_VERSION, "start": self.start, "config": self.determined}

    @property
    def fingerprint(self) -> str:
        """The ingredient's name in the pool."""
        return fingerprint(self.determinants)

    def overrides(self) -> list[str]:
        """Return the overrides that tell a job what the sweep has found out."""
        values = {
            "ingredient.start": self.start,
            "ingredient.monitor": self.monitor,
            "ingredient.mode": self.mode,
            "pool.path": self.pool,
        }
        return [f"++{key}={_quote(str(value))}" for key, value in values.items()]


def _plain(config: DictConfig, key: str) -> dict[str, Any]:
    section = config.get(key)
    return (
        cast(dict[str, Any], OmegaConf.to_container(section, resolve=True)) if isinstance(section, DictConfig) else {}
    )


def _remove(tree: dict[str, Any], path: Sequence[str]) -> None:
    branch: Any = tree
    for part in path[:-1]:
        branch = branch.get(part) if isinstance(branch, dict) else None
    if isinstance(branch, dict):
        cast(dict[str, Any], branch).pop(path[-1], None)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


class NeedsProcesses(BaseException):
    """A fit on several devices, which runs in a program of its own; passes through the project's own `except Exception`."""


class Seen(BaseException):
    """Ends the project's function when its fit has been seen."""


@dataclass(frozen=True)
class ProjectTask:
    """The task function of somebody's program, as a sweep's launcher runs it: every call makes one ingredient.

    Attributes:
        function: takes the configuration and calls `trainer.fit` once.
        module: the module it is in, or the script's path.
        name: its name there.
    """

    function: Callable[[DictConfig], Any]
    module: str
    name: str

    @staticmethod
    def of(function: Callable[[DictConfig], Any]) -> ProjectTask:
        """Note where a task function comes from, so that another process can import it."""
        module = function.__module__
        if module == "__main__":
            main: Any = sys.modules["__main__"]
            spec = getattr(main, "__spec__", None)
            module = spec.name if spec is not None else str(Path(main.__file__).resolve())
        return ProjectTask(function, module, function.__qualname__)

    def __call__(self, config: DictConfig) -> float:
        """Make the ingredient of a configuration, if it is not in the pool; return its held-out metric.

        Raises:
            UserError: for every mistake that the user can put right.
        """
        try:
            return self._make(config)
        except SoupError as error:
            raise UserError(f"\n{error}") from error

    def _make(self, config: DictConfig) -> float:
        project = Project.of(config, HydraConfig.get().job.name)
        pool, name = Pool(project.pool), project.fingerprint
        assert project.monitor is not None  # the sweep's overrides name it
        if name in pool:
            return pool.ingredient(name).heldout(project.monitor)
        pool.check_writable()
        try:
            try:
                make_ingredient(self.function, config, project, alone=True)
            except NeedsProcesses:
                message = ProjectMessage(
                    module=self.module,
                    function=self.name,
                    # Text, because Hydra's part holds enumerations and interpolations.
                    config=OmegaConf.to_yaml(config),
                    hydra=OmegaConf.to_yaml(HydraConfig.get()),
                )
                run_in_processes(make_ingredient_in_ranks, message)
        except Exception as error:
            why = str(error) if isinstance(error, SoupError) else f"{type(error).__name__}: {error}"
            if name not in pool:
                pool.fail(Failure(fingerprint=name, error=why, determinants=project.determinants))
            raise
        return pool.ingredient(name).heldout(project.monitor)


class ProjectMessage(Message):
    """An ingredient that somebody's program makes, for the processes that train it.

    Attributes:
        module, function: the task function: its module or the script's path, and its name there.
        config, hydra: the program's configuration and Hydra's own part, as YAML.
    """

    module: str
    function: str
    config: str
    hydra: str


def make_ingredient_in_ranks(message: ProjectMessage) -> None:
    """Run somebody's task function in this process, one of the ranks."""
    quiet()
    if message.module.endswith(".py"):
        # Not named __main__, so that the script's own main does not run.
        spec = importlib.util.spec_from_file_location("soups_project", message.module)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["soups_project"] = module
        sys.path.insert(0, str(Path(message.module).parent))
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(message.module)
    function: Any = reduce(getattr, message.function.split("."), module)
    function = getattr(function, "__wrapped__", function)  # hydra.main's wrapper
    setup_globals()
    config, hydra = OmegaConf.create(message.config), OmegaConf.create(message.hydra)
    assert isinstance(config, DictConfig)
    schema = OmegaConf.create({"hydra": HydraConf})
    OmegaConf.set_struct(schema["hydra"], False)  # programs add keys of their own there
    whole = OmegaConf.merge(schema, config, {"hydra": hydra})
    assert isinstance(whole, DictConfig)
    HydraConfig.instance().set_config(whole)
    make_ingredient(function, config, Project.of(config, str(HydraConfig.get().job.name)), alone=False)


def make_ingredient(function: Callable[[DictConfig], Any], config: DictConfig, project: Project, alone: bool) -> None:
    """Run a task function in this process and put what its fit leaves into the pool.

    Args:
        function: the task function.
        config: its configuration.
        project: what the sweep knows.
        alone: this process is not one of several ranks, and is not meant to start them.

    Raises:
        ConfigError: it does not call `trainer.fit`, or calls it twice.
        NeedsProcesses: `alone`, and the trainer asks for several devices.
        KeyboardInterrupt: the user stopped the fit.
    """
    pool = Pool(project.pool)
    shared = pool.start(project.start)
    if shared is None:
        raise ConfigError(
            f"The pool {pool.url} does not hold the start {project.start[:8]}; run the sweep that makes it."
        )
    fits: list[Fit] = []

    def receive(fit: Fit) -> None:
        if fits:
            raise ConfigError(
                "The program calls trainer.fit more than once, so it is not clear which fit is the ingredient. Let one run "
                "fit once, and let the sweep vary what differs."
            )
        if alone and fit.processes > 1 and not launched_outside():
            raise NeedsProcesses
        fits.append(fit)
        fit.check()
        fit.initial_weights()  # makes layers that come late
        _give(fit, shared[1])
        cast(Any, fit.trainer).callbacks.append(ReportProgress(pool, project.fingerprint))
        began = time.perf_counter()
        fit.run()
        if fit.trainer.interrupted:
            raise KeyboardInterrupt
        _record(fit, project, pool, began)

    _seed(project.fingerprint)
    with fits_go_to(receive):
        function(config)
    if not fits:
        raise ConfigError(
            "The program ended without calling lightning.pytorch's Trainer.fit, so there is no ingredient. (The package "
            "pytorch_lightning has another Trainer: import lightning.pytorch instead.)"
        )


def _seed(*names: str) -> None:
    """Seed what a program that sets no seeds draws from, so that it, too, gives the same twice and on any launcher."""
    seed = derive_seed(0, *names)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _give(fit: Fit, start: Mapping[str, Any]) -> None:
    try:
        fit.module.load_state_dict(start)
    except RuntimeError as error:
        raise WeightsError(
            f"This run's model is not the shared start's: {str(error)[:300]}. What changes the architecture cannot be part of "
            f"a soup's search space."
        ) from error


def _record(fit: Fit, project: Project, pool: Pool, began: float) -> None:
    weights = finished_weights(fit, project.weights)
    if fit.trainer.is_global_zero:
        fitted = time.perf_counter()
        fit.module.cpu()
        if project.weights != "raw":
            raw = {name: tensor.clone() for name, tensor in fit.module.state_dict().items()}
            metrics = Evaluation(fit).validate(weights)
            fit.module.load_state_dict(raw)
        else:
            metrics = Evaluation(fit).validate()
        check_metric(metrics, project.monitor)
        pool.add(
            Ingredient(
                fingerprint=project.fingerprint,
                determinants=project.determinants,
                start=project.start,
                metrics={"heldout": metrics},
                durations={"fit": fitted - began, "total": time.perf_counter() - began},
                versions=versions(),
                layout=layout(fit.trainer),
            ),
            weights,
        )
    fit.trainer.strategy.barrier("ingredient")


def check_metric(metrics: Mapping[str, float], monitor: str | None) -> str:
    """Return the metric that selects.

    Raises:
        ConfigError: it is not named, or validation does not log it.
    """
    logged = ", ".join(metrics) or "nothing"
    if monitor is None:
        raise ConfigError(
            f"Which held-out metric selects the soup? Validation logs {logged}. Name one on the command line, "
            f"+ingredient.monitor={next(iter(metrics), 'val/acc')}, or in the configuration."
        )
    if monitor not in metrics:
        raise ConfigError(
            f"trainer.validate does not log {monitor!r}; it logs {logged}. Set ingredient.monitor to one."
        )
    return monitor


def see_fit(program: ProjectTask, config: DictConfig, context: HydraContext, overrides: Sequence[str]) -> Fit:
    """Run a program up to its fit, and return that fit, which does not run.

    Raises:
        RunError: the program fails before, or does not come to a fit.
    """
    seen: list[Fit] = []

    def receive(fit: Fit) -> None:
        seen.append(fit)
        raise Seen

    def until_fit(task: DictConfig) -> None:
        _seed("start")
        try:
            with fits_go_to(receive):
                program.function(task)
        except Seen:
            pass

    composed = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.sweep.subdir = "start"
        composed.hydra.job.num = 0
    done: JobReturn = run_job(
        task_function=until_fit, config=composed, job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
        hydra_context=context,
    )  # fmt: skip
    if done.status == JobStatus.FAILED:
        error: Any = done._return_value  # pyright: ignore[reportPrivateUsage]
        raise RunError(f"The program fails before its fit: {type(error).__name__}: {error}") from error
    if not seen:
        raise RunError(
            "The program ended without calling lightning.pytorch's Trainer.fit, so it makes no ingredients. (The package "
            "pytorch_lightning has another Trainer: import lightning.pytorch instead.)"
        )
    seen[0].check()
    return seen[0]


def ensure_shared_start(fit: Fit, project: Project) -> Project:
    """Keep the weights that a fit would start from as the start of all ingredients; return the project with them.

    The program makes them from the configuration without the swept values; where they are random, by the seed that the
    sweep has set before.
    """
    weights = fit.initial_weights()
    name, pool = hash_weights(weights), Pool(project.pool)
    if pool.start(name) is None:
        pool.check_writable()
        pool.add_start(
            Ingredient(fingerprint=name, determinants={"config": project.determined}, versions=versions()), weights
        )
    monitor, mode = project.monitor, project.mode
    if monitor is None:
        monitor, watched = monitor_of(fit.trainer)
        mode = mode or watched
    if mode is None:
        mode = "min" if any(word in str(monitor).lower() for word in ("loss", "error", "perplexity")) else "max"
    return Project(monitor, mode, project.weights, name, project.pool, project.determined)


def belongs(project: Project, pool: Pool, foreign: str, exclude: Sequence[str]) -> list[Ingredient]:
    """Return the ingredients of the project's start.

    Raises:
        ConfigError: there are none.
        WeightsError: some have another start, and `foreign` is "refuse".
    """
    excluded = tuple(exclude)
    found = [record for record in pool.ingredients() if not (excluded and record.fingerprint.startswith(excluded))]
    start = pool.start(project.start)
    assert start is not None
    architecture = hash_architecture(start[1])
    fitting = [record for record in found if record.start == project.start and record.architecture == architecture]
    others = [record.short for record in found if record not in fitting]
    if others and foreign == "refuse":
        raise WeightsError(
            f"{len(others)} of the {len(found)} ingredients in {pool.url} come from another start ({', '.join(others[:4])}), "
            f"and averages of models with different starts are no better than chance. Use a pool for each start "
            f"(++pool.path=…), or leave them out (soup.foreign=skip). A start changes with everything that makes the "
            f"untrained model: pretrained weights, a seed, sizes."
        )
    if not fitting:
        raise ConfigError(
            f"The pool {pool.url} holds no ingredients of this start to cook. Fine-tune some: ++sweep.size=8."
        )
    return fitting
