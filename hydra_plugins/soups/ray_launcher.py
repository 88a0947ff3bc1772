"""`hydra/launcher=ray_local` and `ray_remote`: a sweep's jobs on Ray.

Hydra's own plugin (hydra-ray-launcher 1.2) pins cloudpickle below 3, which a current joblib excludes; this one pins nothing,
runs jobs of lost workers again, and says in seconds when no cluster answers. Ray is imported when a sweep is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Its settings, with what they mean, are in conf/hydra/launcher/ray_local.yaml; the work is in `soups.launch.ray_cluster`."""

    def __init__(
        self,
        address: str | None = None,
        jobs: int | None = None,
        cpus_per_job: float = 1,
        gpus_per_job: float = 0,
        retries: int = 2,
        timeout: float = 20,
        runtime_env: Any = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "address": address,
            "jobs": jobs,
            "cpus_per_job": cpus_per_job,
            "gpus_per_job": gpus_per_job,
            "retries": retries,
            "timeout": timeout,
            "runtime_env": runtime_env,
        }
        self.parts: tuple[DictConfig, HydraContext, TaskFunction] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.parts = (config, hydra_context, task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return their results in order."""
        from soups.launch.ray_cluster import launch

        if self.parts is None:
            raise RuntimeError("Hydra calls setup before launch.")
        return launch(self.options, *self.parts, job_overrides, initial_job_idx)
