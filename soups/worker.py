"""Run a function in processes of its own: `python -m soups.worker FOLDER`.

Lightning starts the other ranks of a distributed run by repeating the program's command line. Inside a sweep that would
repeat the sweep; this program's command line names a folder of calls instead. A call is a function that can be imported
and one typed message. The processes do one call after another, because starting them takes longer than a small fit, and
they end with the process that started them.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict

from soups.errors import RunError, SoupError

_USER_ERROR = 3
_PAUSE = 0.02  # seconds between two looks for a new file
_PATIENCE = 20  # seconds that processes may take to end by themselves

# Variables that a distributed run sets for its own processes.
DISTRIBUTED_VARIABLES = (
    "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    # A job of one task, as a sweep's launcher asks for: without these Lightning starts the other processes itself.
    "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NAME",
)  # fmt: skip


class Message(BaseModel):
    """Base of everything that one process sends another. A message travels as JSON; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Call(Message):
    """A function and what it is called with.

    Attributes:
        module, function: where to import the function from, and its dotted name there.
        message: its argument, as JSON values.
    """

    module: str
    function: str
    message: dict[str, Any]


Sent = TypeVar("Sent", bound=Message)


def run_in_processes(function: Callable[[Sent], object], message: Sent, *, reuse: str | None = None) -> None:
    """Call a function in another process, and in every further rank that a trainer in it starts.

    Args:
        function: importable, with one annotated parameter; what it returns is lost.
        message: its argument.
        reuse: name of a kind of processes. The processes of the last call of the same kind and environment do this one too,
            and those of another kind end. None starts processes that end with this call.

    Raises:
        RunError: the function raised a `SoupError` (whose message it has), or the processes died.
        ValueError: the function cannot be imported by another process.
    """
    call = _Call(module=function.__module__, function=function.__qualname__, message=message.model_dump(mode="json"))
    if call.module == "__main__" or "<" in call.function:
        raise ValueError(f"{call.module}.{call.function} cannot be imported by another process.")
    if reuse is None:
        group = _Group()
        try:
            group.run(call)
        finally:
            group.close()
    else:
        _Group.shared(json.dumps([reuse, sorted(_environment().items())])).run(call)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in DISTRIBUTED_VARIABLES}


class _Group:
    """Processes that do calls, and the folder through which they get them."""

    _kept: ClassVar[dict[str, _Group]] = {}

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="soups-job-")
        self._count = 0
        environment = _environment()
        environment["PYTHONPATH"] = os.pathsep.join(place for place in sys.path if place)
        environment["SOUPS_PARENT"] = str(os.getpid())
        command = [sys.executable, "-m", "soups.worker", self._folder.name]
        self._process = subprocess.Popen(command, env=environment)
        atexit.register(self.close)

    @classmethod
    def shared(cls, key: str) -> _Group:
        """Return the living processes of a kind, or new ones; those of other kinds end."""
        for other in [other for other in cls._kept if other != key]:
            cls._kept.pop(other).close()
        if key not in cls._kept or cls._kept[key]._process.poll() is not None:
            cls._kept[key] = cls()
        return cls._kept[key]

    def run(self, call: _Call) -> None:
        """Have a call done.

        Raises:
            RunError: it failed, and the processes with it.
        """
        self._count += 1
        path = _call_file(Path(self._folder.name), self._count)
        _write(path, json.dumps(call.model_dump()))
        try:
            while not path.with_suffix(".done").exists():
                if self._process.poll() is not None and not path.with_suffix(".done").exists():
                    error = path.with_suffix(".error")
                    why = f"the processes of the run ended with code {self._process.returncode}"
                    raise RunError(error.read_text() if error.exists() else why)
                time.sleep(_PAUSE)
        except BaseException:  # an interruption too: nobody waits for the call any more
            self._process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Let the processes end, and wait for that."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            _end_file(Path(self._folder.name)).touch()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


def _call_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _end_file(folder: Path) -> Path:
    return folder / "end"


def _write(path: Path, text: str) -> None:
    """Write a small file that appears whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
    """Do the calls that appear in `folder`, in order; return the exit code."""
    _end_with(int(os.environ["SOUPS_PARENT"]))
    number = 1
    while folder.exists() and not _end_file(folder).exists():
        path = _call_file(folder, number)
        if not path.exists():
            time.sleep(_PAUSE)
            continue
        try:
            _do(_Call.model_validate_json(path.read_text()))
        except SoupError as error:
            if _is_first():
                _write(path.with_suffix(".error"), str(error))
            return _USER_ERROR
        _release()
        if _is_first():
            path.with_suffix(".done").touch()
        number += 1
    return 0


def _do(call: _Call) -> None:
    function: Any = reduce(getattr, call.function.split("."), importlib.import_module(call.module))
    (parameter,) = inspect.signature(function).parameters
    function(get_type_hints(function)[parameter].model_validate(call.message))


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _release() -> None:
    """Give back the memory of a finished call: the process that ordered it may want it."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    # Under this name, so that a function's module and this one share the class `Message`.
    from soups.worker import main as run

    sys.exit(run(Path(sys.argv[1])))
