"""The soup sweeper: expands a search space into ingredients, runs those the pool lacks, and ends in a soup.

Hydra finds sweepers in the namespace package `hydra_plugins`; everything this one does is in `soups.launch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Hydra's configuration of the sweeper; the search space is in the `sweep` group.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="soup",
    node={"_target_": "hydra_plugins.soups.sweeper.SoupSweeper"},
    provider="soups",
)


class SoupSweeper(Sweeper):
    """See `soups.launch.sweep`.

    Args:
        params: a search space that the program has for Hydra's own sweeper or Optuna's; see `soups.launch.own_program.sweep`.
        theirs: other settings of those sweepers. Hydra hands them to the sweeper in use, and this one has no use for them.
    """

    def __init__(self, params: Mapping[str, Any] | None = None, **theirs: Any) -> None:
        del theirs
        self.params = dict(params or {})
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None
        self.program: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over, and build the configured launcher."""
        from soups.launch.own_program.configuration import is_ours
        from soups.launch.own_program.task import ProgramTask

        self.config = config
        self.hydra_context = hydra_context
        if not is_ours(config):  # somebody's own train.py: each call of its function makes an ingredient
            task_function = self.program = ProgramTask.of(task_function)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[Any]:
        """Run the sweep and make the soup."""
        from soups.launch.own_program.sweep import run_own_program
        from soups.launch.sweep import run_sweep

        if self.config is None or self.hydra_context is None or self.launcher is None:
            raise RuntimeError("Hydra calls setup before sweep.")
        if self.program is not None:
            return run_own_program(self.config, self.hydra_context, self.launcher, arguments, self.program, self.params)
        return run_sweep(self.config, self.hydra_context, self.launcher, arguments)
