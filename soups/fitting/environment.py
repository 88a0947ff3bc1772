"""The machine that a command runs on: devices, ranks, and versions of the libraries that training runs through."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import torch

import soups
from soups.errors import ConfigError, RunError
from soups.fitting.configuration import Devices


def device_for(devices: Devices) -> torch.device:
    """Return the first device that the settings allow."""
    if devices.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if devices.accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_count(devices: Devices) -> int:
    """Return on how many devices of this machine the settings run.

    Raises:
        ConfigError: `trainer.devices` is neither a number, a list nor "auto".
    """
    given = devices.devices
    if isinstance(given, list):
        return len(given)
    if str(given) in ("auto", "-1"):
        on_gpu = devices.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"trainer.devices={given} must be a number, a list of device numbers, or auto.") from None


def needs_processes(devices: Devices) -> bool:
    """Tell whether a fit on these devices needs processes that nobody has started yet."""
    return device_count(devices) > 1 and not launched_outside()


def kind_of_processes(devices: Devices) -> str:
    """Return the name of the kind of processes that the settings ask for; see `soups.worker.run_in_processes`."""
    return json.dumps([devices.accelerator, devices.devices, devices.num_nodes, devices.strategy])


def launched_outside() -> bool:
    """Tell whether another program (torchrun, srun) started the processes of this run."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def refuse_sweeps_in_ranks() -> None:
    """Check that this process, which is to run a sweep, is the only one that does.

    Raises:
        RunError: torchrun or srun started several.
    """
    if launched_outside() and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        raise RunError(
            "This sweep was started by torchrun or srun in several processes, and each of them would run the whole sweep. "
            "Start it as one process (python train.py …): trainer.devices=2 trainer.strategy=ddp gives each fit its "
            "processes, and hydra/launcher=slurm or ray_remote its machines. Single runs may be started by torchrun and srun."
        )


def is_first_process() -> bool:
    """Tell whether this process is rank 0, also before Lightning has set anything up."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def versions() -> dict[str, str]:
    """Return the versions of this code and of the libraries that training runs through."""
    names = ("torch", "torchvision", "timm", "lightning", "transformers", "numpy")
    found = {"soups": soups.__version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
