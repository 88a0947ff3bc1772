"""The protocol sweeper: runs the plan behind `+protocol=…`; everything it does is in `soups.launch.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="protocol",
    node={"_target_": "hydra_plugins.soups.protocol.ProtocolSweeper"},
    provider="soups",
)


class ProtocolSweeper(Sweeper):
    """See `soups.launch.protocol`."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over, and build the configured launcher."""
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[Any]:
        """Run the plan and report it."""
        from soups.launch.protocol import run_protocol

        if self.config is None or self.hydra_context is None or self.launcher is None:
            raise RuntimeError("Hydra calls setup before sweep.")
        return run_protocol(self.config, self.hydra_context, self.launcher, arguments)
