"""`hydra/launcher=submitit_local_capped`: submitit's processes on this machine, some at a time.

Hydra's `submitit_local` starts all jobs of a sweep within the same second, which few machines survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class CappedLauncher(Launcher):
    """`submitit_local` in rounds.

    Args:
        jobs: processes in a round.
        settings: those of `submitit_local`.
    """

    def __init__(self, jobs: int = 2, **settings: Any) -> None:
        try:
            submitit: Any = import_module("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
        except ModuleNotFoundError as error:
            from soups.errors import install

            raise CompactHydraException(
                f"hydra/launcher=submitit_local_capped needs submitit ({error}): {install('slurm')}."
            ) from error
        self.jobs = max(1, int(jobs))
        self.local: Any = submitit.LocalLauncher(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hand on what Hydra hands over."""
        self.local.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch one round after the other; when a process dies, the others still run, and then its error is raised."""
        results: list[JobReturn] = []
        died: Exception | None = None
        for first in range(0, len(job_overrides), self.jobs):
            try:
                results += self.local.launch(job_overrides[first : first + self.jobs], initial_job_idx + first)
            except Exception as error:  # submitit has several for a lost process
                died = died or error
        if died is not None:
            raise died
        return results
