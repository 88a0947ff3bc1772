"""Trainers of TRL by configuration: their classes and fields, rewards and prompts; everything is checked before a fit."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from soups.errors import ConfigError, did_you_mean
from soups.fitting.progress import StepFile
from soups.fitting.schema import build
from soups.tasks.completions import Row, check_rows, prompt_file

# Arguments of every trainer that tunes to rewards.
NEEDED = ("model", "reward_funcs", "args", "train_dataset", "processing_class", "callbacks")

# Fields of TRL's configuration that the protocol sets itself, with the way out.
OURS = {
    "output_dir": "a fit writes into a temporary folder, and its result into the pool",
    "save_strategy": "a killed fit is done again",
    "resume_from_checkpoint": "a killed fit is done again",
    "push_to_hub": "results are in the pool, and protocol.export writes models",
    "seed": "use seed",
    "reward_weights": "they are the λ of protocol.study",
    "use_cpu": "use trainer.accelerator",
}
# Fields that decide nothing of the result.
REPORTED = (
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "log_completions",
    "num_completions_to_print",
    "log_level",
)


def require_trl() -> None:
    """Check that TRL can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("protocol=rewarded_soups_trl needs TRL, which is not installed: pip install 'soups[trl]'")


def trainer_classes(trainer: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """Return the classes of a trainer and of its configuration, GRPOConfig for GRPOTrainer.

    Raises:
        ConfigError: there are no such classes, or the trainer does not tune to rewards.
    """
    target = str(trainer.get("_target_", ""))
    found = _imported(target, "protocol.trainer._target_")
    taken = inspect.signature(found).parameters if inspect.isclass(found) else {}
    if missing := [name for name in NEEDED if name not in taken]:
        raise ConfigError(
            f"protocol.trainer._target_={target} takes no {missing[0]}, so it does not tune a model to rewards. "
            f"trl.GRPOTrainer and trl.RLOOTrainer do."
        )
    if unknown := sorted(set(trainer) - set(taken) - {"_target_"}):
        raise ConfigError(
            f"protocol.trainer.{unknown[0]} is no argument of {target}: {did_you_mean(unknown[0], taken)}"
        )
    if clash := sorted(set(trainer) & {*NEEDED, "peft_config"}):
        raise ConfigError(f"protocol.trainer.{clash[0]} is set by the protocol: use its other settings.")
    name = str(args.get("_target_", target.removesuffix("Trainer") + "Config"))
    config = _imported(name, "protocol.args._target_")
    if not dataclasses.is_dataclass(config) or not isinstance(config, type):
        raise ConfigError(
            f"protocol.args._target_={name} must be a configuration class of TRL, such as trl.GRPOConfig."
        )
    return found, config


def check_fields(config: type[Any], args: Mapping[str, Any], multi_objective: bool) -> None:
    """Check the fields that a configuration class is given.

    Args:
        config: such as trl.GRPOConfig.
        args: the fields.
        multi_objective: whether there are references on weighted sums of rewards.

    Raises:
        ConfigError: a field that does not exist, or that the protocol sets itself.
    """
    for key in args:
        if key in OURS:
            raise ConfigError(f"protocol.args.{key} cannot be set: {OURS[key]}.")
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    if unknown := sorted(set(args) - fields):
        raise ConfigError(
            f"protocol.args.{unknown[0]} is no setting of {config.__name__}: {did_you_mean(unknown[0], fields)}"
        )
    if multi_objective and "reward_weights" not in fields:
        raise ConfigError(
            f"{config.__name__} has no reward_weights, so there is no multi-objective reference with it: "
            f"protocol.study.multi_objective=[]"
        )


def _imported(target: str, where: str) -> Any:
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}={target!r} cannot be imported: {error}.") from error


def find_reward(section: Mapping[str, Any], where: str) -> Callable[[], Callable[..., Any]]:
    """Return what makes a reward: a function with the section's arguments bound, or an object of a class built from them.

    Raises:
        ConfigError: it cannot be imported, or takes no such argument.
    """
    target = _imported(str(section.get("_target_", "")), f"{where}._target_")
    values = {key: value for key, value in section.items() if key != "_target_"}
    if inspect.isclass(target):
        return lambda: build(dict(section), where)
    return lambda: functools.partial(target, **values) if values else target


def read_prompts(source: Any, part: str) -> list[Row]:
    """Return the prompts of a part from a file's name or a `_target_`.

    Raises:
        ConfigError: neither is given.
        soups.errors.DataError: the prompts cannot be had.
    """
    where = f"protocol.prompts.{part}"
    if isinstance(source, str):
        return prompt_file(source)
    if not isinstance(source, Mapping) or "_target_" not in source:
        raise ConfigError(f"{where}={source!r} must be a file of prompts, or a section with _target_.")
    found: Any = build({str(key): value for key, value in source.items()}, where)
    return check_rows(list(found), where)


def reporter(progress: StepFile) -> Any:
    """Return a callback of transformers that keeps a file of progress."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            progress.write(int(state.global_step), int(state.max_steps))

    return Reporter()
