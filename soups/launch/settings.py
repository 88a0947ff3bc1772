"""From a composed configuration to the settings of one ingredient, and to the fingerprint of what decides its weights."""

from __future__ import annotations

import inspect
import json
import os
import platform
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, cast

import torch
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import soups
from soups.errors import ConfigError, RunError, did_you_mean
from soups.stores.files import fingerprint
from soups.stores.pool import Pool
from soups.tasks.data import Splits
from soups.tasks.network import Network

Settings = dict[str, Any]

# Raise it when a change of this code changes the weights that the same settings give.
TRAINING_VERSION = 1

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


def build(section: Settings, name: str, **more: Any) -> Any:
    """Call what `section["_target_"]` names with the section's other values and `more`.

    Raises:
        ConfigError: there is no such function, or it takes no such argument.
    """
    values = {key: value for key, value in section.items() if key != "_target_"}
    target = str(section.get("_target_", ""))
    module, _, attribute = target.rpartition(".")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}._target_={target!r} cannot be imported: {error}.") from error
    signature = inspect.signature(function)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if not open_ended and (unknown := sorted(set(values) - set(signature.parameters))):
        raise ConfigError(
            f"{name}.{unknown[0]} is no setting of {target}: {did_you_mean(unknown[0], signature.parameters)}"
        )
    try:
        signature.bind(**{**more, **values})
    except TypeError as error:
        raise ConfigError(f"{name}: {target} cannot be called with these settings: {error}.") from error
    return function(**{**more, **values})


@dataclass(frozen=True)
class Task:
    """The data and the network of some settings, built.

    Attributes:
        splits: the data.
        network: the model, with the weights it was pretrained with.
    """

    splits: Splits
    network: Network


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


def probe_determinants(settings: Settings, split: str) -> Settings:
    """Return what decides the weights of the linear probe."""
    return {
        "training_version": TRAINING_VERSION,
        "split": split,
        "model": settings["model"],
        "probe": settings["start"]["probe"],
        "seed": settings["start"]["seed"],
        "size": settings["loader"]["size"],
    }


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


def determinants(settings: Settings, start: str, split: str) -> Settings:
    """Return what decides the weights of an ingredient.

    Args:
        settings: of the run.
        start: weights hash of the shared start.
        split: split hash of the data.
    """
    trainer = {key: value for key, value in settings["trainer"].items() if key not in LAYOUT}
    model = {key: value for key, value in settings["model"].items() if key != "pretrained"}
    return {
        "training_version": TRAINING_VERSION,
        "start": start,
        "split": split,
        "model": model,
        "seed": settings["seed"],
        "task": settings["task"],
        "optimizer": settings["optimizer"],
        "augment": settings["augment"],
        "size": settings["loader"]["size"],
        "batch_size": settings["loader"]["batch_size"],
        "trainer": trainer,
        "callbacks": settings.get("callbacks") or {},
        "weights": settings["ingredient"]["weights"],
    }


def name_of(determined: Settings) -> str:
    """Return the fingerprint of some determinants."""
    return fingerprint(determined)


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
    """Check the values that would fail late or silently.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    rules: list[tuple[str, bool, str]] = []
    optimizer, task, loader = settings["optimizer"], settings["task"], settings["loader"]
    rules.append(("optimizer.name", optimizer["name"] in ("adamw", "sgd"), "adamw or sgd"))
    rules.append(("optimizer.schedule", optimizer["schedule"] in ("cosine", "constant"), "cosine or constant"))
    rules.append(("optimizer.lr", _number(optimizer["lr"]) > 0, "a positive number"))
    rules.append(("optimizer.weight_decay", _number(optimizer["weight_decay"]) >= 0, "a number of at least 0"))
    rules.append(("task.label_smoothing", 0 <= _number(task["label_smoothing"]) < 1, "a number in [0, 1)"))
    for key in ("size", "batch_size", "eval_batch_size"):
        rules.append((f"loader.{key}", _number(loader[key]) >= 1, "a positive whole number"))
    if from_elsewhere(settings) and "soup" not in settings:
        raise ConfigError(
            f"Checkpoints from elsewhere ({settings['pool']['path']}) are read and never added to: cook them, +soup=greedy."
        )
    for key, fine, allowed in rules:
        if not fine:
            section, _, leaf = key.partition(".")
            raise ConfigError(f"{key}={settings[section][leaf]} must be {allowed}.")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


class UserError(CompactHydraException):
    """A `SoupError` as Hydra shows it: its message, without a traceback."""
