"""From a composed Hydra configuration to a typed one, and errors as Hydra shows them."""

from __future__ import annotations

from typing import Any, cast

from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soups.errors import ConfigError
from soups.fitting.configuration import Configuration, read_configuration
from soups.stores.pool import Pool

# A resolved configuration as plain values; `Configuration` is the same, typed and checked.
Settings = dict[str, Any]


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


def configuration_of(config: DictConfig) -> Configuration:
    """Return a composed configuration, resolved, typed and checked.

    Raises:
        ConfigError: a value is missing, or a name or value is not allowed.
    """
    return read_configuration(resolve(config))


def open_pool(settings: Settings) -> Pool:
    """Open the pool that the settings name."""
    return Pool(settings["pool"]["path"])


class UserError(CompactHydraException):
    """A `SoupError` as Hydra shows it: its message, without a traceback."""
