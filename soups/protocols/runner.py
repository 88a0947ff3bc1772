"""What a protocol is to whoever runs it: a typed configuration, a plan, the operations of its nodes, and a report.

`+protocol=NAME` names a class by `protocol._target_`. The class says which configuration it reads (`Configuration`); every
other setting is refused by name, so that no override is ignored in silence. The sections of `conf/train.yaml` that a
protocol does not read are null in its file under `conf/protocol`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field

from soups.errors import ConfigError, did_you_mean
from soups.fitting.configuration import (
    Devices,
    IngredientSettings,
    Layout,
    Loader,
    LoaderLayout,
    Paths,
    PoolSection,
    Tracking,
    Trainer,
)
from soups.fitting.schema import Section, Seed, Target, check_target, checked, part_of, section_at, target_of
from soups.fitting.spec import FitSpec, LoaderSpec, Optimizer, Task, TrainerSpec, Validation
from soups.protocols.execution import Operation
from soups.protocols.plan import Plan
from soups.reporting.page import Page
from soups.stores.files import fingerprint
from soups.stores.pool import Pool


class ProtocolConfiguration(Section):
    """What every protocol's command can be told; each protocol adds the sections that it reads, and its own, `protocol`."""

    seed: Seed
    tracking: Tracking
    pool: PoolSection
    paths: Paths

    @property
    def devices(self) -> Devices:
        """Where fits run."""
        return Devices()

    @property
    def layout(self) -> Layout:
        """Where and how the protocol runs."""
        return Layout(
            devices=self.devices,
            validation=Validation(),
            loader=LoaderLayout(),
            tracking=self.tracking,
            pool=self.pool,
            paths=self.paths,
        )


class FittingConfiguration(ProtocolConfiguration):
    """Configuration of protocols whose fits are those of `python train.py`, on data and from weights of their own.

    A protocol whose fits read the sections `task` or `augment` adds these fields.
    """

    model: Target
    optimizer: Optimizer
    trainer: Trainer
    callbacks: dict[str, Target | None] | None = None
    ingredient: IngredientSettings = Field(default_factory=IngredientSettings)
    loader: Loader

    @property
    def devices(self) -> Devices:
        """Where fits run."""
        return part_of(Devices, self.trainer)

    def fit(self, data: Mapping[str, Any]) -> FitSpec:
        """Return the fit that the settings describe on some data.

        Raises:
            ConfigError: the data or a callback cannot be built from their sections.
        """
        callbacks = {name: section for name, section in (self.callbacks or {}).items() if section}
        for name, section in callbacks.items():
            check_target(section, f"callbacks.{name}")
        check_target(data, "data")
        check_target(self.model, "model", "num_classes")
        return FitSpec(
            model=self.model,
            data=dict(data),
            seed=self.seed,
            task=getattr(self, "task", Task()),
            optimizer=self.optimizer,
            augment=getattr(self, "augment", None),
            loader=part_of(LoaderSpec, self.loader),
            trainer=part_of(TrainerSpec, self.trainer),
            validation=part_of(Validation, self.trainer) if callbacks else None,
            callbacks=callbacks,
            keep=self.ingredient.weights,
        )

    @property
    def layout(self) -> Layout:
        """Where and how the protocol runs."""
        return Layout(
            devices=self.devices,
            validation=part_of(Validation, self.trainer),
            loader=part_of(LoaderLayout, self.loader),
            tracking=self.tracking,
            pool=self.pool,
            paths=self.paths,
        )


C = TypeVar("C", bound=ProtocolConfiguration)


class ProtocolRunner(ABC, Generic[C]):
    """A protocol, built from its configuration.

    Args:
        configuration: the settings, of the class that `Configuration` names.

    Attributes:
        name: of the protocol, for folders and titles.
        Configuration: the settings that it reads.
    """

    name: ClassVar[str]
    Configuration: ClassVar[type[ProtocolConfiguration]]

    def __init__(self, configuration: C) -> None:
        self.configuration = configuration

    @abstractmethod
    def plan(self) -> Plan:
        """Return the plan; the same in every process that has these settings."""

    @abstractmethod
    def operations(self) -> Mapping[str, Operation]:
        """Return the operations that the plan's nodes name."""

    @abstractmethod
    def page(self, plan: Plan, pool: Pool) -> Page:
        """Return the report of a finished plan, from its results alone."""

    @property
    def shown(self) -> dict[str, Any]:
        """Settings that decide the report alone, and no node."""
        return {}

    def export(self, plan: Plan, pool: Pool, folder: Path) -> None:
        """Write models that other libraries load into the report's folder, unless they are there; most protocols have none."""

    def fingerprint(self, plan: Plan) -> str:
        """Return the name of the report: SHA-256 (hex) of the plan's targets and of the settings that are shown."""
        return fingerprint([[node.fingerprint for node in plan.targets], self.shown])


def build_protocol(settings: Mapping[str, Any]) -> ProtocolRunner[Any]:
    """Build the protocol that composed settings name.

    Args:
        settings: plain and resolved. A section that the protocol does not read is absent or null.

    Raises:
        ConfigError: there is no such protocol, it does not read a setting, or a value is not allowed.
    """
    section = settings.get("protocol") or {}
    kind = target_of(section, "protocol")
    if not (isinstance(kind, type) and issubclass(kind, ProtocolRunner)):
        raise ConfigError(
            f"protocol._target_={section.get('_target_')} must be a class derived from soups.protocols.ProtocolRunner."
        )
    values = {key: value for key, value in settings.items() if key not in ("protocol", "node")}
    values["protocol"] = {key: value for key, value in section.items() if key != "_target_"}
    return kind(checked(kind.Configuration, _read(kind.Configuration, values, kind.name)))


def _read(kind: type[Section], values: Mapping[str, Any], protocol: str, prefix: str = "") -> dict[str, Any]:
    """Return the settings without the null ones that a protocol does not read.

    A section may say in `ELSEWHERE`, by name, how a setting is given that belongs somewhere else.

    Raises:
        ConfigError: a setting that the protocol does not read has a value.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kind.model_fields:
            if value is None:
                continue
            if reason := getattr(kind, "ELSEWHERE", {}).get(key):
                raise ConfigError(f"{prefix}{key} {reason}")
            leaf = f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""
            raise ConfigError(
                f"{prefix}{key}{leaf} is no setting of +protocol={protocol}: {did_you_mean(key, kind.model_fields)}"
            )
        section = section_at(kind, (key,))
        nested = section is not None and isinstance(value, Mapping)
        found[key] = _read(section, value, protocol, f"{prefix}{key}.") if nested and section else value
    return found
