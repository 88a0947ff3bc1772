"""Hydra's complaints about settings that do not exist, as one sentence with the nearest valid name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from soups.errors import ConfigError, UserError, did_you_mean
from soups.fitting.schema import check_target


def unknown_setting(error: HydraException) -> ConfigError | None:
    """Return Hydra's error about an override of a setting that does not exist as ours; None for other errors."""
    cause = error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not isinstance(cause.parent_node, DictConfig):
        return None
    key, names = str(cause.full_key), [str(name) for name in cause.parent_node]
    if not names:
        return ConfigError(f"{key.rpartition('.')[0]} is a value and has no settings: there is no {key}.")
    return ConfigError(f"{key} is no setting: {did_you_mean(str(cause.key), names)}")


@contextmanager
def nearest_names() -> Generator[None]:
    """Within the block, Hydra names the nearest setting when an override names none.

    Hydra composes the configuration before it calls the program, and has no hook for errors; so its loader is wrapped.
    """
    original = ConfigLoaderImpl.load_configuration

    def load(self: ConfigLoaderImpl, *arguments: Any, **named: Any) -> DictConfig:
        try:
            return original(self, *arguments, **named)
        except HydraException as error:
            if (found := unknown_setting(error)) is None:
                raise
            raise UserError(f"\n{found}") from None

    ConfigLoaderImpl.load_configuration = load
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = original


def check_hydra(config: DictConfig) -> None:
    """Check Hydra's own part of a composed configuration, where `+` adds what nothing reads.

    Raises:
        ConfigError: a setting that Hydra, the launcher or the sweeper does not have.
    """
    _check_typed(config.hydra, "hydra")
    for name in ("launcher", "sweeper"):
        section: Any = OmegaConf.to_container(config.hydra[name], resolve=False)
        if section and "_target_" in section:
            check_target(section, f"hydra.{name}")


def _check_typed(node: DictConfig, prefix: str) -> None:
    """Check a node that a dataclass describes, and those below it."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    for name in node:
        if str(name) not in kind.__dataclass_fields__:
            raise ConfigError(f"{prefix}.{name} is no setting: {did_you_mean(str(name), kind.__dataclass_fields__)}")
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, str(name)):
            continue
        if isinstance(node[name], DictConfig):
            _check_typed(node[name], f"{prefix}.{name}")


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the keys, or groups, that overrides name.

    >>> keys_of(["+soup=greedy", "optimizer.lr=1e-4", "~sweep.space.seed", "++a.b=1"])
    ['soup', 'optimizer.lr', 'sweep.space.seed', 'a.b']
    """
    return [one.get_key_element().lstrip("+~") for one in OverridesParser.create().parse_overrides(list(overrides))]
