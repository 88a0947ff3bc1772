"""The sweep behind `+soup=…` in somebody's program: rehearse it, make the missing ingredients, choose the soup, show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from soups.errors import SoupError
from soups.fitting.environment import refuse_sweeps_in_ranks, versions
from soups.fitting.quiet import quiet
from soups.launch.failures import leave, tell_failures
from soups.launch.own_program.configuration import Program
from soups.launch.own_program.direction import choose_metric
from soups.launch.own_program.evaluation import Evaluation
from soups.launch.own_program.interception import Fit
from soups.launch.own_program.module_weights import extra_state
from soups.launch.own_program.options import check_options
from soups.launch.own_program.rehearsal import rehearsal
from soups.launch.own_program.soup import make_soup
from soups.launch.own_program.task import ProgramTask
from soups.launch.search_space import split_arguments
from soups.launch.settings import UserError
from soups.launch.sweep import Wanted, compose_one, label, plan, run_missing
from soups.launch.terminal import show_report
from soups.stores.pool import Ingredient, Pool
from soups.weights import hash_weights

_NOTHING_VARIES = (
    "Nothing varies, so the command asks for one ingredient. Say what does, in the configuration's section sweep.space or on the "
    "command line: -m +soup=greedy seed=0,1,2, or ++sweep.space.seed=\"'range(0, 100)'\"."
)


def run_own_program(
    config: DictConfig,
    context: HydraContext,
    launcher: Launcher,
    arguments: Sequence[str],
    task: ProgramTask,
    params: Mapping[str, Any] | None = None,
) -> Sequence[JobReturn]:
    """Run a sweep over somebody's program that ends in a soup.

    Args:
        config: composed with the overrides that do not sweep.
        context: Hydra's.
        launcher: that runs the fits.
        arguments: of the command line.
        task: the program's task function.
        params: the search space that the program has for another sweeper (`hydra.sweeper.params`); it is this sweep's
            where the configuration has no `sweep.space`.

    Raises:
        UserError: a mistake in settings, program or pool; all ingredients failed.
        SystemExit: 3, after the soup, when some ingredients failed.
    """
    quiet()
    try:
        refuse_sweeps_in_ranks()
        results, failed = _Sweep(config, context, launcher, arguments, task, params or {}).run()
    except SoupError as error:
        raise UserError(f"\n{error}") from error
    leave(tell_failures(Console(), failed))
    return results


class _Sweep:
    """One command. See `run_own_program` for the arguments."""

    def __init__(
        self,
        config: DictConfig,
        context: HydraContext,
        launcher: Launcher,
        arguments: Sequence[str],
        task: ProgramTask,
        params: Mapping[str, Any],
    ) -> None:
        self.config, self.context, self.launcher, self.task = config, context, launcher, task
        if params and OmegaConf.select(config, "sweep.space") is None:
            config = config.copy()
            OmegaConf.set_struct(config, False)
            OmegaConf.update(config, "sweep.space", {key: str(value) for key, value in params.items()}, force_add=True)
        self.fixed, self.points = plan(config, arguments)
        _, swept, given = split_arguments(arguments)
        self.given = [*given, *swept]
        # A key with + is new to the program's configuration; with ++ it may be the program's own, except in our section.
        added = [text for text in arguments if text.startswith("+") and not text.startswith("++pool.")]
        self.added = [_key(text) for text in added]
        self.varied = tuple(dict.fromkeys(_key(text) for point in self.points for text in point))
        self.soup = cast(dict[str, Any], OmegaConf.to_container(config.soup, resolve=True))
        check_options(self.soup, self.given)

    def run(self) -> tuple[Sequence[JobReturn], Any]:
        """Make the ingredients that are missing, then the soup; return the launcher's results and the failures."""
        composed = self._compose(self.fixed)
        whole = Program.of(_without_hydra(composed), self._job, self.added, self.varied)
        with rehearsal(self.task, self.config, self.context, self.fixed, whole.spec.fit) as fit:
            start = keep_start(fit, whole)
            evaluation = Evaluation(fit, whole.spec.config, self.varied)
            metrics = evaluation.validate()
            assert evaluation.data is not None
            monitor, mode, told = choose_metric(whole.monitor, whole.mode, metrics, fit, composed)
            program = whole.on(start, evaluation.data.digest, monitor, mode)
            wanted = self._wanted(program)
            if wanted and not self.varied:
                told = [*told, _NOTHING_VARIES]

            def describe(record: Ingredient) -> str:
                return f"{monitor} {record.heldout(monitor):.4f}"

            results, failed = run_missing(Pool(program.pool), wanted, self.launcher, describe)
            asked = [item.fingerprint for item in wanted]
            report, folder = make_soup(program, self.soup, evaluation, asked, self._output(), told)
            strict = ", strict=False" if extra_state(fit.module) else ""
            load = f"module.load_state_dict(safetensors.torch.load_file('{folder}/soup.safetensors'){strict})"
            show_report(report, folder, load, Console())
        return results, failed

    @property
    def _job(self) -> str:
        return str(self.config.hydra.job.name)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return compose_one(self.context.config_loader.load_sweep_config, self.config, list(overrides), hydra=True)

    def _wanted(self, program: Program) -> list[Wanted]:
        """Return the ingredients that the command asks for, each once."""
        found: dict[str, Wanted] = {}
        for point in self.points:
            overrides = [*self.fixed, *point, *program.overrides()]
            own = Program.of(_without_hydra(self._compose(overrides)), self._job, varied=self.varied)
            found.setdefault(own.fingerprint, Wanted(own.fingerprint, overrides, label(point)))
        return list(found.values())

    def _output(self) -> Path:
        """Return the folder for results, absolute: the program may have its own idea of the working folder."""
        try:
            place = OmegaConf.select(self.config, "paths.output")
        except OmegaConfBaseException:  # an interpolation that has a value only within a job
            place = None
        return Path(str(place or "outputs")).absolute()


def keep_start(fit: Fit, program: Program) -> str:
    """Keep the weights that a fit would start from as the start of all ingredients; return their hash.

    The program makes them from the configuration without the swept values; where they are random, by the seed that the
    rehearsal has set before.
    """
    weights = fit.initial_weights()
    name, pool = hash_weights(weights), Pool(program.pool)
    if pool.start(name) is None:
        pool.check_writable()
        determinants = program.spec.determinants()
        pool.add_start(Ingredient(fingerprint=name, determinants=determinants, versions=versions()), weights)
    return name


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _without_hydra(config: DictConfig) -> DictConfig:
    copy = config.copy()
    OmegaConf.set_struct(copy, False)
    copy.pop("hydra", None)
    return copy
