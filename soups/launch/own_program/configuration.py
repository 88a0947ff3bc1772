"""The settings of a program that is not ours: our sections in it, and what of the rest decides an ingredient's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soups.errors import ConfigError, did_you_mean
from soups.fitting.spec import fingerprint
from soups.launch.own_program.determined import KEYS, OURS, determined, our_keys

# Raise it when a change of this code changes the weights that the same program and configuration give.
PROGRAM_VERSION = 2
# Our keys that users set; the sweep sets the others.
_PUBLIC = ("monitor", "mode", "weights", "fit", "ignore")


def is_ours(config: DictConfig) -> bool:
    """Tell whether a configuration was made from `conf/train.yaml`, or belongs to another program."""
    return all(section in config for section in ("start", "loader", "task"))


@dataclass(frozen=True)
class ProgramSpec:
    """What decides the weights of an ingredient of somebody's program, as far as a configuration can say: not its code.

    Attributes:
        config: the program's configuration without our own keys, paths and loggers.
        weights: what a fit leaves: "raw", "best" or the name of an average.
        fit: which call of `trainer.fit` counts.
        start: hash of the weights that all ingredients start from; empty until they are known.
        data: digest of the validation data; empty until it is known.
    """

    config: Mapping[str, Any]
    weights: str
    fit: str
    start: str
    data: str

    def determinants(self) -> dict[str, Any]:
        """Return what the fingerprint is made of."""
        return {
            "program_version": PROGRAM_VERSION,
            "start": self.start,
            "data": self.data,
            "weights": self.weights,
            "fit": self.fit,
            "config": dict(self.config),
        }


@dataclass(frozen=True)
class Program:
    """The settings of one ingredient.

    Attributes:
        monitor: the metric that selects; None until the trainer was seen.
        mode: "max" or "min"; None until the trainer was seen.
        spec: what decides the weights.
        pool: where ingredients are kept, an absolute path or a URL.
        varied: keys that the sweep varies; they always count.
    """

    monitor: str | None
    mode: Literal["max", "min"] | None
    spec: ProgramSpec
    pool: str
    varied: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @staticmethod
    def of(config: DictConfig, job: str, given: Sequence[str] = (), varied: Sequence[str] = ()) -> Program:
        """Read a composed configuration.

        Args:
            config: of the program, without Hydra's part.
            job: its name, for the default pool.
            given: keys that the command line adds to the program's configuration.
            varied: keys that the sweep varies.

        Raises:
            ConfigError: an unknown key or value of ours, or a sweep over one.
        """
        section, pool = _section(config, "ingredient"), _section(config, "pool")
        for name, values in (("ingredient", section), ("pool", pool)):
            _check_keys(name, values, given)
        for key in varied:
            if key.partition(".")[0] in OURS or (key in our_keys() and key != "ingredient.weights"):
                raise ConfigError(f"{key} cannot vary within a sweep: one command has one of it. Give it one value.")
        mode = section.get("mode")
        if mode not in (None, "min", "max"):
            raise ConfigError(f"ingredient.mode={mode}: {did_you_mean(str(mode), ('min', 'max'))}")
        fit = str(section.get("fit") or "last")
        if fit != "last" and not (fit.isdigit() and int(fit) > 0):
            raise ConfigError(
                f"ingredient.fit={fit} must be `last`, or the number of the call of trainer.fit that counts, from 1."
            )
        varied = tuple(varied) or tuple(str(key) for key in section.get("varied") or ())
        ignored = tuple(str(key) for key in section.get("ignore") or ())
        spec = ProgramSpec(
            config=determined(config, ignored, varied),
            weights=str(section.get("weights") or "raw"),
            fit=fit,
            start=str(section.get("start") or ""),
            data=str(section.get("data") or ""),
        )
        place = str(pool.get("path") or f"pools/{job}")
        return Program(section.get("monitor"), mode, spec, _absolute(place), varied, ignored)

    @property
    def fingerprint(self) -> str:
        """The ingredient's name in the pool."""
        return fingerprint(self.spec)

    def on(self, start: str, data: str, monitor: str, mode: Literal["max", "min"]) -> Program:
        """Return the settings with the findings of the rehearsal."""
        return replace(self, spec=replace(self.spec, start=start, data=data), monitor=monitor, mode=mode)

    def overrides(self) -> list[str]:
        """Return the overrides that hand the findings of the rehearsal to a job."""
        values = {
            "ingredient.start": self.spec.start,
            "ingredient.data": self.spec.data,
            "ingredient.monitor": self.monitor,
            "ingredient.mode": self.mode,
            "pool.path": self.pool,
        }
        varied = ",".join(quoted(key) for key in self.varied)
        return [*(f"++{key}={quoted(str(value))}" for key, value in values.items()), f"++ingredient.varied=[{varied}]"]


def quoted(text: str) -> str:
    """Return a text as a value of Hydra's override grammar."""
    escaped = re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'")
    return f"'{escaped}'"


def _section(config: DictConfig, name: str) -> dict[str, Any]:
    """Return our keys of a section, resolved, and the names of the others."""
    found = config.get(name) if name in config else None
    if not isinstance(found, DictConfig):
        return {}
    try:
        return {
            str(key): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value := found[key]) else value
            for key in found
            if key in KEYS[name]
        } | {str(key): None for key in found if key not in KEYS[name]}
    except OmegaConfBaseException as error:
        raise ConfigError(f"The section {name} of the configuration cannot be resolved: {error}") from error


def _check_keys(name: str, values: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse a misspelt key of ours: one that the command line adds to a section of ours, or one that resembles ours.

    A program may have a section `pool` or `ingredient` of its own, whose other keys are its own business.
    """
    public = [key for key in KEYS[name] if name != "ingredient" or key in _PUBLIC]
    theirs = [key for key in values if key not in KEYS[name]]
    typed = {key.removeprefix(f"{name}.") for key in given if key.startswith(f"{name}.")}
    own_section = bool(set(theirs) - typed)
    for key in theirs:
        hint = did_you_mean(key, public)
        if hint.startswith("did you mean") or (key in typed and not own_section):
            raise ConfigError(f"{name}.{key} is unknown: {hint}")


def _absolute(place: str) -> str:
    """Return a folder as an absolute path: jobs may run in other folders (hydra.job.chdir). URLs stay as they are."""
    return place if "://" in place else str(Path(place).expanduser().absolute())
