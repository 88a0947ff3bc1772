"""A suite as a YAML file: one model, and tasks that name their data.

    name: my_suite
    model: {_target_: soups.tasks.text_models.huggingface_text, name: /path/of/an/encoder, pooling: mean}
    loader: {size: 32, batch_size: 16}
    optimizer: {name: adamw, lr: 3e-4, weight_decay: 0.01, warmup: 0.1, schedule: cosine}
    trainer: {max_epochs: 3}
    tasks:
      reviews: {data: {_target_: soups.tasks.text_files.text_files, train: reviews.csv}}
      letters: {data: {_target_: soups.tasks.text_files.text_files, train: letters.csv}, adaptation: 100}

`conf/suite` holds the ones that come with the project; `open_suite("texts")` finds them by name, `open_suite("my.yaml")` reads
another file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import Field

from soups.errors import ConfigError, did_you_mean
from soups.fitting.schema import Count, Flag, Section, Seed, Target, check_target, checked
from soups.fitting.spec import Augment, FitSpec, LoaderSpec, Optimizer, Task, TrainerSpec

# A link to conf/suite.
FOLDER = Path(__file__).parent / "conf"


class Pretraining(Section):
    """How the base model is trained from random weights, on data of its own.

    Attributes:
        data: section with `_target_`.
        optimizer, trainer, augment: as for an expert.
    """

    data: Target
    optimizer: Optimizer
    trainer: TrainerSpec
    augment: Augment | None = None


class TaskSpec(Section):
    """One task of a suite.

    Attributes:
        data: section whose `_target_` returns `soups.tasks.data.Splits`.
        adaptation: samples of its train split that are set aside for fitting coefficients; None takes the suite's number.
        fit: sections that differ from the suite's, of `optimizer`, `trainer`, `task`, `loader` and `augment`.
    """

    data: Target
    adaptation: Count | None = None
    fit: dict[str, Any] = Field(default_factory=dict[str, Any])


class SuiteSpec(Section):
    """A suite.

    Attributes:
        name: of the suite.
        model: section with `_target_`; the width of its head is the task's.
        tasks: by name, at least two.
        adaptation: samples of each train split that are set aside for fitting coefficients.
        seed: of the adaptation splits, heads, order of the data and dropout.
        train_head: train the head with the backbone; false keeps the linear probe of the base model, so that any backbone goes
            with any head.
        eval_batch_size: samples of an evaluation batch.
        loader, optimizer, trainer, task, augment: of the experts, as in `conf/train.yaml`.
        pretraining: how the base model is made; None takes it as `model` gives it.
    """

    name: str
    model: Target
    tasks: dict[str, TaskSpec]
    adaptation: Count = 300
    seed: Seed = 0
    train_head: Flag = False
    eval_batch_size: Count = 50
    loader: LoaderSpec
    optimizer: Optimizer
    trainer: TrainerSpec
    task: Task = Task()
    augment: Augment | None = None
    pretraining: Pretraining | None = None

    def fit(self, task: str) -> FitSpec:
        """Return what decides the fit of a task's expert.

        Raises:
            ConfigError: a section in the task's `fit` that an expert does not have, or a value that is not allowed.
        """
        one = self.tasks[task]
        allowed = ("optimizer", "trainer", "task", "loader", "augment")
        if unknown := sorted(set(one.fit) - set(allowed)):
            raise ConfigError(f"tasks.{task}.fit.{unknown[0]} is no setting: {did_you_mean(unknown[0], allowed)}")
        values = {
            "model": self.model,
            "data": one.data,
            "seed": self.seed,
            "task": self.task.plain(),
            "optimizer": self.optimizer.plain(),
            "augment": self.augment and self.augment.plain(),
            "loader": self.loader.plain(),
            "trainer": self.trainer.plain(),
        }
        return FitSpec.read(values).with_(**one.fit)


def read_suite(source: str | Path) -> SuiteSpec:
    """Return the suite of a YAML file, or one of `conf/suite` by its name.

    Raises:
        ConfigError: there is no such suite or file, or a setting in it is unknown or not allowed.
    """
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
        if str(source) not in known:
            raise ConfigError(
                f"There is no suite {str(source)!r}: {did_you_mean(str(source), known)} A file of your own ends in .yaml."
            )
        path = known[str(source)]
    if not path.is_file():
        raise ConfigError(f"There is no suite file {path}.")
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the settings of a suite: name, model, tasks, loader, optimizer, trainer.")
    spec = checked(SuiteSpec, {"name": path.stem, **cast(dict[str, Any], values)}, f"{path.name}: ")
    check_suite(spec)
    return spec


def check_suite(spec: SuiteSpec) -> None:
    """Check what would fail late.

    Raises:
        ConfigError: fewer than two tasks, or a target that does not take its settings.
    """
    if len(spec.tasks) < 2:
        raise ConfigError(f"The suite {spec.name} has {len(spec.tasks)} task(s); merging needs at least two.")
    check_target(spec.model, "model", "num_classes")
    for name, one in spec.tasks.items():
        check_target(one.data, f"tasks.{name}.data")
        spec.fit(name)
    if spec.pretraining is not None:
        check_target(spec.pretraining.data, "pretraining.data")
