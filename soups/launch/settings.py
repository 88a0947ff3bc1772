"""From a composed configuration to the settings of one ingredient, and to the fingerprint of what decides its weights."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any, cast

import torch
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import soups
from soups.errors import ConfigError, RunError
from soups.fitting.configuration import Configuration, read_configuration
from soups.fitting.schema import build
from soups.fitting.spec import TRAINING_VERSION as TRAINING_VERSION
from soups.fitting.spec import FitSpec
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.network import Network

Settings = dict[str, Any]

# Where and on how much hardware a run happens. The batch size is global and every random number is derived from what it
# is for, so these change the weights by rounding only: they do not enter the fingerprint.
LAYOUT = (
    "accelerator", "devices", "strategy", "num_nodes", "threads", "deterministic", "benchmark", "sync_batchnorm",
    "check_val_every_n_epoch", "limit_val_batches", "num_sanity_val_steps", "log_every_n_steps", "profiler",
    "enable_progress_bar",
)  # fmt: skip


def resolve(config: DictConfig) -> Settings:
    """Return a composed configuration as plain, resolved values, without Hydra's own part.

    Raises:
        ConfigError: a value is missing (`???`) or an interpolation cannot be resolved.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{missing[0]} has no value: give it on the command line, {missing[0]}=…")
    try:
        return cast(Settings, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"The configuration cannot be resolved: {error}") from error


def build_splits(settings: Settings) -> Splits:
    """Build the data of some settings, and check that it came as splits."""
    splits = build(settings["data"], "data")
    if not isinstance(splits, Splits):
        raise ConfigError(f"data._target_={settings['data'].get('_target_')} must return soups.tasks.data.Splits.")
    return splits


def build_network(settings: Settings, num_classes: int) -> Network:
    """Build the model of some settings; what is random in it (a fresh head) comes from `start.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(settings["start"]["seed"]))
        network = build(settings["model"], "model", num_classes=num_classes)
    if not isinstance(network, Network):
        raise ConfigError(
            f"model._target_={settings['model'].get('_target_')} must return soups.tasks.network.Network."
        )
    if settings["task"]["channels_last"]:
        network.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


def configuration_of(config: DictConfig) -> Configuration:
    """Return a composed configuration, resolved, typed and checked.

    Raises:
        ConfigError: a value is missing, or a name or value is not allowed.
    """
    return read_configuration(resolve(config))


def fit_of(settings: Settings) -> FitSpec:
    """Return the fit that the settings describe."""
    return read_configuration(settings).fit


def shared_settings(settings: Settings) -> Settings:
    """Return the settings of the shared first epochs: those of `start`, whatever the sweep changes."""
    start = settings["start"]
    trainer = {**settings["trainer"], "max_epochs": start["epochs"], "devices": 1, "num_nodes": 1, "strategy": "auto"}
    return {
        **settings,
        "seed": start["seed"],
        "optimizer": start["optimizer"],
        "augment": start["augment"],
        "task": {**settings["task"], "label_smoothing": 0.0},
        "trainer": {**trainer, "check_val_every_n_epoch": start["epochs"]},
        "callbacks": {},
        "ingredient": {"weights": "raw"},
    }


def open_pool(settings: Settings) -> Pool:
    """Open the pool that the settings name."""
    return Pool(settings["pool"]["path"])


def from_elsewhere(settings: Settings) -> bool:
    """Tell whether the ingredients are checkpoints that were made elsewhere (`pool=folder`), and not a pool of ours."""
    return settings["pool"].get("format") == "checkpoints"


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


def device_count(settings: Settings) -> int:
    """Return on how many devices of this machine the trainer's settings run.

    Raises:
        ConfigError: `trainer.devices` is neither a number, a list nor "auto".
    """
    devices: Any = settings["trainer"]["devices"]
    if isinstance(devices, (list, tuple)):
        return len(cast(list[Any], devices))
    if str(devices) in ("auto", "-1"):
        on_gpu = str(settings["trainer"]["accelerator"]) in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    try:
        return int(devices)
    except ValueError:
        raise ConfigError(f"trainer.devices={devices} must be a number, a list of device numbers, or auto.") from None


def processes(settings: Settings) -> str:
    """Return the kind of processes that the trainer's settings ask for; see `soups.worker.run_in_processes`."""
    return json.dumps([settings["trainer"].get(key) for key in ("accelerator", "devices", "num_nodes", "strategy")])


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


def check(settings: Settings) -> None:
    """Check every name and value.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    read_configuration(settings)


class UserError(CompactHydraException):
    """A `SoupError` as Hydra shows it: its message, without a traceback."""
