"""A sweep's jobs on Ray: a cluster started for the sweep and stopped after it, or one that runs at an address."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from soups.errors import ConfigError, RunError, install

# Ray keeps this much shared memory of a cluster that we start; weights go through the pool, so the smallest is enough.
_OBJECT_STORE = 100 * 2**20


def launch(
    options: Mapping[str, Any],
    config: DictConfig,
    context: HydraContext,
    task: TaskFunction,
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run jobs on Ray and return their results in order.

    A job whose worker or node dies is run again, `retries` times; then it counts as failed, and the others go on.

    Args:
        options: of `hydra_plugins.soups.ray_launcher.RayLauncher`.
        config: the sweep's.
        context: Hydra's.
        task: runs one job.
        job_overrides: of each job.
        first: number of the first job.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    with cluster(options) as ray:
        remote = ray.remote(
            num_cpus=options["cpus_per_job"],
            num_gpus=options["gpus_per_job"],
            max_retries=int(options["retries"]),
            max_calls=1 if options["gpus_per_job"] else 0,  # a worker that ends gives its GPU memory back
        )(run_one)
        shared = ray.put((context, config, task, Singleton.get_state(), str(Path.cwd())))
        waiting = list(enumerate(job_overrides))
        limit = int(options["jobs"] or len(waiting))
        running: dict[Any, int] = {}
        results: dict[int, JobReturn] = {}
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    number, overrides = waiting.pop(0)
                    running[remote.remote(shared, list(overrides), first + number)] = number
                for done in ray.wait(list(running), num_returns=1)[0]:
                    number = running.pop(done)
                    try:
                        results[number] = ray.get(done)
                    except ray.exceptions.RayError as error:
                        results[number] = _lost(error, job_overrides[number], int(options["retries"]))
        finally:
            for left in running:  # the sweep was stopped
                ray.cancel(left, force=True)
    return [results[number] for number in range(len(job_overrides))]


def _lost(error: Exception, overrides: Sequence[str], retries: int) -> JobReturn:
    reason = str(error).strip().splitlines()
    failure = RunError(
        f"Ray lost this job, and {retries} more attempts did not help ({type(error).__name__}: "
        f"{reason[0] if reason else ''}). Run the same command again; memory is the usual reason: cpus_per_job=… makes room."
    )
    done = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
    done.return_value = failure
    return done


def run_one(shared: tuple[Any, ...], overrides: list[str], number: int) -> JobReturn:
    """Run one job in a Ray worker."""
    context, config, task, state, folder = shared
    setup_globals()
    Singleton.set_state(state)
    if Path(folder).is_dir():  # on this machine, or on one that shares its files
        os.chdir(folder)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
        composed.hydra.job.num = number
    return run_job(
        hydra_context=context, config=composed, task_function=task, job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )  # fmt: skip


@contextlib.contextmanager
def cluster(options: Mapping[str, Any]) -> Generator[Any]:
    """Yield the module `ray`, connected; a cluster that was started here is stopped afterwards.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address within `timeout` seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = import_module("ray")
    except ModuleNotFoundError as error:
        raise ConfigError(f"hydra/launcher=ray_… needs Ray ({error}): {install('ray')}.") from error
    address = options["address"]
    common: dict[str, Any] = {
        "runtime_env": dict(options["runtime_env"] or {}) or None,
        "log_to_driver": False,
        "logging_level": "error",
    }
    try:
        if address is None:
            jobs = options["jobs"]
            cpus = max(1, round(jobs * options["cpus_per_job"])) if jobs else None
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                configure_logging=True,
                **common,
            )
        else:
            _knock(str(address), float(options["timeout"]))
            ray.init(address=str(address), **common)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        where = "start a cluster on this machine" if address is None else f"reach a Ray cluster at {address}"
        raise ConfigError(
            f"Cannot {where}: {error}. Check that the head node runs (`ray start --head`), that its port can be reached "
            f"from here, that Ray's version there is {ray.__version__}, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN are those "
            f"of the cluster; or run here: hydra/launcher=ray_local. No job was started."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str, timeout: float) -> None:
    """Connect to a cluster's port, since Ray itself would try for minutes.

    Raises:
        OSError: nobody answers.
        ValueError: the address has no port.
    """
    if address == "auto":  # found by Ray on this machine, or not, at once
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    if not parts.hostname or not parts.port:
        raise ValueError("an address is HOST:PORT (6379 is usual), ray://HOST:PORT (10001) or auto")
    socket.create_connection((parts.hostname, parts.port), timeout=timeout).close()
