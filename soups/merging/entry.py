"""`soups.merge`: one door for methods and for configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from soups.errors import ConfigError
from soups.merging.api import merge as merge_models
from soups.merging.mergekit import merge_configuration


def merge(what: Any, *arguments: Any, **options: Any) -> dict[str, Tensor] | Path | str:
    """Merge by a configuration in mergekit's format, or by a method.

    Args:
        what: a mapping with `merge_method`, or the path of a YAML file that holds one; otherwise a method, its name, or
            methods by pattern of tensor names.
        arguments: the output's path for a configuration; the models for a method.
        options: those of `soups.merging.mergekit.merge_configuration`, or of `soups.merging.merge`.

    Returns:
        The weights, or the path or URL that was written.

    >>> import torch
    >>> merge("linear", [{"w": torch.zeros(1)}, {"w": torch.ones(1)}])["w"]
    tensor([0.5000])
    """
    if isinstance(what, Mapping) and "merge_method" in cast("Mapping[str, Any]", what):
        return merge_configuration(cast("Mapping[str, Any]", what), *arguments, **options)
    if isinstance(what, Path) or (isinstance(what, str) and what.endswith((".yml", ".yaml"))):
        return merge_configuration(what, *arguments, **options)
    if not arguments and "models" not in options:
        raise ConfigError("Name the models to merge: merge('ties', ['a', 'b'], base='c'), or give a configuration.")
    return merge_models(what, *arguments, **options)
