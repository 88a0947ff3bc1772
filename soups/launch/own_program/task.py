"""The task function of somebody's program, as a sweep's launcher runs it: every call makes one ingredient."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from soups.errors import SoupError
from soups.fitting.quiet import quiet
from soups.launch.own_program.configuration import Program
from soups.launch.own_program.ingredient import NeedsProcesses, make_ingredient
from soups.launch.own_program.loggers import own_run
from soups.launch.settings import UserError
from soups.stores.pool import Failure, Pool
from soups.worker import Message, run_in_processes


@dataclass(frozen=True)
class ProgramTask:
    """A task function; calling it makes the ingredient of a configuration.

    Attributes:
        function: takes the configuration and calls `trainer.fit`.
        module: the module it is in, or the script's path.
        name: its name there.
    """

    function: Callable[[DictConfig], Any]
    module: str
    name: str

    @staticmethod
    def of(function: Callable[[DictConfig], Any]) -> ProgramTask:
        """Note where a task function comes from, so that another process can import it."""
        module = function.__module__
        if module == "__main__":
            main: Any = sys.modules["__main__"]
            spec = getattr(main, "__spec__", None)
            module = spec.name if spec is not None else str(Path(main.__file__).resolve())
        return ProgramTask(function, module, function.__qualname__)

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
        program = Program.of(config, HydraConfig.get().job.name)
        pool, name = Pool(program.pool), program.fingerprint
        assert program.monitor is not None  # the sweep's overrides name it
        if name in pool:
            return pool.ingredient(name).heldout(program.monitor)
        pool.check_writable()
        try:
            try:
                with own_run(*_tracking(program, config)):
                    make_ingredient(self.function, config, program, alone=True)
            except NeedsProcesses:
                message = ProgramMessage(
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
                pool.fail(Failure(fingerprint=name, error=why, determinants=program.spec.determinants()))
            raise
        return pool.ingredient(name).heldout(program.monitor)


def _tracking(program: Program, config: DictConfig) -> tuple[str, bool]:
    """Return the W&B group of a program's runs, and whether its configuration names W&B."""
    return Path(program.pool).name, "wandb" in OmegaConf.to_yaml(config).lower()


class ProgramMessage(Message):
    """An ingredient that somebody's program makes, for the processes that train it.

    Attributes:
        module, function: the task function: its module or the script's path, and its name there.
        config, hydra: the program's configuration and Hydra's own part, as YAML.
    """

    module: str
    function: str
    config: str
    hydra: str


def make_ingredient_in_ranks(message: ProgramMessage) -> None:
    """Run somebody's task function in this process, one of the ranks."""
    quiet()
    if message.module.endswith(".py"):
        # Not named __main__, so that the script's own main does not run.
        spec = importlib.util.spec_from_file_location("soups_own_program", message.module)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["soups_own_program"] = module
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
    program = Program.of(config, str(HydraConfig.get().job.name))
    with own_run(*_tracking(program, config)):
        make_ingredient(function, config, program, alone=False)
