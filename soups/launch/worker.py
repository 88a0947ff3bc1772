"""One ingredient's fit, one soup's search, or one node of a protocol's plan, as a program of its own: `python -m soups.launch.worker job.json`.

Lightning starts the other processes of a distributed run by repeating the program's command line. Inside a sweep that
would be the sweep; this program's command line is one job. It ends when the process that started it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

from soups.errors import SoupError
from soups.launch.settings import RunError, Settings

Job = Literal["fit", "cook", "node", "contribute", "project"]
_USER_ERROR = 3


def run_in_processes(job: Job, settings: Settings, show_progress: bool, **more: Any) -> None:
    """Run a job in a process group of its own, as the trainer's settings say.

    Raises:
        RunError: the job failed; with its own message where the user can act on it.
    """
    with tempfile.TemporaryDirectory(prefix="soups-job-") as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps({"job": job, "settings": settings, "show_progress": show_progress, **more}))
        environment = {key: value for key, value in os.environ.items() if key not in _OF_THE_PARENT}
        environment["PYTHONPATH"] = os.pathsep.join(place for place in sys.path if place)
        environment["SOUPS_PARENT"] = str(os.getpid())
        command = [sys.executable, "-m", "soups.launch.worker", str(path)]
        done = subprocess.run(command, env=environment, check=False)
        error = path.with_suffix(".error")
        if done.returncode:
            message = (
                error.read_text() if error.exists() else f"the processes of the run ended with code {done.returncode}"
            )
            raise RunError(message)


# Variables that a distributed run sets for its own processes.
_OF_THE_PARENT = (
    "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    # A job of one task, as a sweep's launcher asks for: without these Lightning starts the other processes itself.
    "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NAME",
)  # fmt: skip


def _end_with(parent: int) -> None:
    """End this process when `parent` is gone: a killed sweep must not leave fits running behind it."""

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(path: Path) -> int:
    """Run the job in `path`; return the exit code."""
    from soups.launch.quiet import quiet

    quiet()
    _end_with(int(os.environ["SOUPS_PARENT"]))
    job = json.loads(path.read_text())
    settings: Settings = job["settings"]
    try:
        if job["job"] == "fit":
            from soups.launch.fine_tune import fit
            from soups.launch.settings import build_splits
            from soups.launch.start import ensure_start

            splits = build_splits(settings)
            fit(settings, splits, *ensure_start(settings, splits), show_progress=job["show_progress"])
        elif job["job"] == "node":
            from soups.launch.protocol import run_node_in_ranks

            run_node_in_ranks(settings, job["node"])
        elif job["job"] == "project":
            _project(settings, job["module"], job["function"])
        elif job["job"] == "contribute":
            from soups.launch.protocol import contribute_in_ranks

            contribute_in_ranks(settings, job["contribution"])
        else:
            from soups.launch.cook import cook_in_ranks

            cook_in_ranks(settings, job["members"], Path(job["folder"]))
    except SoupError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            path.with_suffix(".error").write_text(str(error))
        return _USER_ERROR
    return 0


def _project(settings: Settings, place: str, name: str) -> None:
    """Run the task function of somebody's own program, found again by its place."""
    import importlib.util
    from functools import reduce

    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals
    from omegaconf import DictConfig, OmegaConf

    from soups.launch.project import Project, make_ingredient

    if place.endswith(".py"):
        # Not named __main__, so that the script's own main does not run.
        spec = importlib.util.spec_from_file_location("soups_project", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["soups_project"] = module
        sys.path.insert(0, str(Path(place).parent))
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function: Any = reduce(getattr, name.split("."), module)
    function = getattr(function, "__wrapped__", function)  # hydra.main's wrapper
    setup_globals()
    config, hydra = OmegaConf.create(settings["config"]), OmegaConf.create(settings["hydra"])
    assert isinstance(config, DictConfig)
    schema = OmegaConf.create({"hydra": HydraConf})
    OmegaConf.set_struct(schema["hydra"], False)  # programs add keys of their own there
    whole = OmegaConf.merge(schema, config, {"hydra": hydra})
    assert isinstance(whole, DictConfig)
    HydraConfig.instance().set_config(whole)
    make_ingredient(function, config, Project.of(config, str(HydraConfig.get().job.name)), alone=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
