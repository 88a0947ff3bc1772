"""Fits, a soup's search, or nodes of a protocol's plan, in processes of their own: `python -m soups.launch.worker FOLDER`.

Lightning starts the other processes of a distributed run by repeating the program's command line. Inside a sweep that
would be the sweep; this program's command line is a folder of jobs. The processes do one job after another, since starting
them takes longer than a small fit, and end when the process that started them does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from soups.errors import SoupError
from soups.launch.settings import RunError, Settings
from soups.stores.files import write_json

Job = Literal["fit", "cook", "node", "contribute", "project"]
_USER_ERROR = 3


def run_in_processes(job: Job, settings: Settings, show_progress: bool, *, alone: bool = False, **more: Any) -> None:
    """Run a job in a process group, as the trainer's settings say.

    Args:
        job: which.
        settings: all settings.
        show_progress: whether the job shows its own.
        alone: in processes that do nothing before or after; otherwise in those of the job before, if it was one of the same
            devices, strategy and environment.
        more: what else the job needs.

    Raises:
        RunError: the job failed; with its own message where the user can act on it.
    """
    trainer = settings.get("trainer", {})
    wanted = {key: trainer.get(key) for key in ("accelerator", "devices", "num_nodes", "strategy")}
    environment = {key: value for key, value in os.environ.items() if key not in _OF_THE_PARENT}
    group = _Group() if alone else _Group.shared(json.dumps([wanted, sorted(environment.items())]))
    try:
        group.run({"job": job, "settings": settings, "show_progress": show_progress, **more})
    finally:
        if alone:
            group.close()


class _Group:
    """Processes that do jobs, and the folder through which they are told."""

    _kept: ClassVar[dict[str, _Group]] = {}

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="soups-job-")
        self._count = 0
        environment = {key: value for key, value in os.environ.items() if key not in _OF_THE_PARENT}
        environment["PYTHONPATH"] = os.pathsep.join(place for place in sys.path if place)
        environment["SOUPS_PARENT"] = str(os.getpid())
        command = [sys.executable, "-m", "soups.launch.worker", self._folder.name]
        self._process = subprocess.Popen(command, env=environment)
        atexit.register(self.close)

    @classmethod
    def shared(cls, key: str) -> _Group:
        """Return the processes that did the last job of the same kind, or new ones; others end."""
        for other in [other for other in cls._kept if other != key]:
            cls._kept.pop(other).close()
        if key not in cls._kept or cls._kept[key]._process.poll() is not None:
            cls._kept[key] = cls()
        return cls._kept[key]

    def run(self, job: dict[str, Any]) -> None:
        """Have a job done.

        Raises:
            RunError: it failed, and the processes with it.
        """
        self._count += 1
        path = _job(Path(self._folder.name), self._count)
        write_json(path, job)
        try:
            while not path.with_suffix(".done").exists():
                if self._process.poll() is not None and not path.with_suffix(".done").exists():
                    error = path.with_suffix(".error")
                    why = f"the processes of the run ended with code {self._process.returncode}"
                    raise RunError(error.read_text() if error.exists() else why)
                time.sleep(_PAUSE)
        except BaseException:  # an interruption too: nobody waits for the job any more
            self._process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Let the processes end, and wait for that."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            _end(Path(self._folder.name)).touch()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


_PAUSE = 0.02  # seconds between looks
_PATIENCE = 20  # seconds for processes to end by themselves


def _job(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _end(folder: Path) -> Path:
    return folder / "end"


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


def main(folder: Path) -> int:
    """Do the jobs that appear in `folder`, in order; return the exit code."""
    from soups.launch.quiet import quiet

    quiet()
    _end_with(int(os.environ["SOUPS_PARENT"]))
    number = 1
    while folder.exists() and not _end(folder).exists():
        path = _job(folder, number)
        if not path.exists():
            time.sleep(_PAUSE)
            continue
        code = _do(path)
        if code:
            return code
        _release()
        if _is_first():
            path.with_suffix(".done").touch()
        number += 1
    return 0


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _release() -> None:
    """Give back what a job held: between jobs the process that ordered them may want the memory."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _do(path: Path) -> int:
    """Do one job; return the exit code."""
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
        if _is_first():
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
