"""The whole configuration of a command, typed: what decides a fit (`FitSpec`), and the `Layout` of where and how it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from soups.errors import ConfigError
from soups.fitting.schema import Count, CountOrNone, Flag, Section, Seed, Target, check_target, checked, part_of
from soups.fitting.spec import RAW, Augment, FitSpec, LoaderSpec, Optimizer, Start, Task, TrainerSpec, Validation


class Devices(Section):
    """Settings of Lightning's Trainer that say where a fit runs: they change its weights by rounding at most."""

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    strategy: str = "auto"
    num_nodes: Count = 1
    threads: Count | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: Flag | None = None
    profiler: str | None = None
    detect_anomaly: Flag = False


class LoaderLayout(Section):
    """How batches are read."""

    eval_batch_size: Count = 250
    workers: CountOrNone = 0


class Trainer(TrainerSpec, Validation, Devices):
    """The section `trainer`."""


class Loader(LoaderSpec, LoaderLayout):
    """The section `loader`."""


class IngredientSettings(Section):
    """What a fit leaves in the pool: "raw", or the name of one of its averages."""

    weights: str = RAW


class Tracking(Section):
    """Weights & Biases."""

    # YAML reads a bare `off` as false.
    mode: Annotated[
        Literal["online", "offline", "off"], BeforeValidator(lambda mode: "off" if mode is False else mode)
    ] = "off"
    project: str | None = "soups"
    entity: str | None = None
    group: str | None = None


class PoolSection(Section):
    """Where ingredients are kept; with `format: checkpoints`, checkpoints made elsewhere."""

    path: str | list[str]
    format: Literal["checkpoints"] | None = None
    state: str | None = None
    prefix: str | None = None
    cache: str | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        only = sorted(self.model_fields_set & {"state", "prefix", "cache"})
        if only and self.format is None:
            raise ValueError(f"pool.{only[0]} is for checkpoints made elsewhere (pool=folder): leave it out.")
        return self


class Paths(Section):
    """Where results are written."""

    output: str = "outputs"


class Sweep(Section):
    """Which ingredients `+soup=…` asks for; `space` in Hydra's override grammar, nested as the keys are."""

    method: Literal["random", "grid"] = "random"
    size: CountOrNone = 8
    seed: Seed = 0
    space: dict[str, Any] | None = None


class Layout(Section):
    """Where and how a command runs. Nothing here decides weights."""

    devices: Devices
    validation: Validation
    loader: LoaderLayout
    tracking: Tracking
    pool: PoolSection
    paths: Paths

    def with_(self, **sections: Mapping[str, Any]) -> Self:
        """Return the layout with some settings of some sections changed: `devices={"devices": 2}`.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        values = self.plain()
        return checked(
            type(self), {**values, **{name: {**values.get(name, {}), **new} for name, new in sections.items()}}
        )

    def on_one_device(self) -> Self:
        """Return the layout of a fit that has the same bits on any number of devices: it runs on one."""
        return self.with_(devices={"devices": 1, "num_nodes": 1, "strategy": "auto"})


class Configuration(Section):
    """Everything that a command of `train.py` can be told.

    `soup`, `sweep` and `protocol` say which fits there are and what becomes of them; each fit is `fit`, and `layout` says
    where it runs. `node` is the node of a protocol's plan that a launched job does.
    """

    model: Target
    data: Target
    optimizer: Optimizer
    trainer: Trainer
    callbacks: dict[str, Target | None] | None = None
    tracking: Tracking
    pool: PoolSection
    sweep: Sweep | None = None
    seed: Seed
    task: Task
    ingredient: IngredientSettings = Field(default_factory=IngredientSettings)
    start: Start
    loader: Loader
    augment: Augment | None = None
    paths: Paths
    soup: dict[str, Any] | None = None
    protocol: Target | None = None
    node: str | None = None

    @property
    def fit(self) -> FitSpec:
        """The fit that these settings describe; see `FitSpec.of`."""
        callbacks = {name: section for name, section in (self.callbacks or {}).items() if section}
        return FitSpec(
            model=self.model,
            data=self.data,
            seed=self.seed,
            task=self.task,
            optimizer=self.optimizer,
            augment=self.augment,
            loader=part_of(LoaderSpec, self.loader),
            trainer=part_of(TrainerSpec, self.trainer),
            validation=part_of(Validation, self.trainer) if callbacks else None,
            callbacks=callbacks,
            keep=self.ingredient.weights,
            start=self.start,
        )

    @property
    def layout(self) -> Layout:
        """Where and how it runs."""
        return Layout(
            devices=part_of(Devices, self.trainer),
            validation=part_of(Validation, self.trainer),
            loader=part_of(LoaderLayout, self.loader),
            tracking=self.tracking,
            pool=self.pool,
            paths=self.paths,
        )


def read_configuration(values: Mapping[str, Any]) -> Configuration:
    """Return a composed configuration, checked: names, values, and the arguments of every `_target_`.

    Raises:
        ConfigError: naming the key, what is allowed, and the nearest valid name.
    """
    found = checked(Configuration, dict(values))
    check_target(found.model, "model", "num_classes")
    check_target(found.data, "data")
    for name, section in found.fit.callbacks.items():
        check_target(section, f"callbacks.{name}")
    if found.protocol is not None:
        check_target(found.protocol, "protocol", "settings")
    if found.pool.format == "checkpoints" and found.soup is None:
        raise ConfigError(
            f"Checkpoints from elsewhere ({found.pool.path}) are read and never added to: ask for their soup, +soup=greedy."
        )
    return found
