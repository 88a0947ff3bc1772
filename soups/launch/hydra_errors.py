"""Hydra's complaints about settings that do not exist, as one sentence with the nearest valid name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from soups.errors import ConfigError, did_you_mean
from soups.fitting.schema import check_target
from soups.launch.settings import UserError


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


def check_hydra(hydra: DictConfig) -> None:
    """Check the overrides of Hydra's own part, where `+` may have added settings that nothing reads.

    Args:
        hydra: that part, composed.

    Raises:
        ConfigError: a setting that Hydra, the launcher or the sweeper does not have.
    """
    for key in keys_of([str(text) for text in hydra.overrides.hydra]):
        node: Any = hydra
        kind: Any = HydraConf
        for name in key.split(".")[1:]:
            if is_dataclass(kind) and name not in (known := [one.name for one in fields(kind)]):
                raise ConfigError(f"{key} is no setting: {did_you_mean(name, known)}")
            node = OmegaConf.select(node, name, throw_on_missing=False) if isinstance(node, DictConfig) else None
            kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    for name in ("launcher", "sweeper"):
        section: Any = OmegaConf.to_container(hydra[name], resolve=False)
        if section and "_target_" in section:
            check_target(section, f"hydra.{name}")


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the keys, or groups, that overrides name.

    >>> keys_of(["+soup=greedy", "optimizer.lr=1e-4", "~sweep.space.seed", "++a.b=1"])
    ['soup', 'optimizer.lr', 'sweep.space.seed', 'a.b']
    """
    return [one.get_key_element().lstrip("+~") for one in OverridesParser.create().parse_overrides(list(overrides))]
