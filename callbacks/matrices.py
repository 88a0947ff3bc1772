"""The matrices of linear maps in a module: where they are kept, and which of their dimensions run over inputs."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from soups.stores.averages import plain_name

# Layers of torch whose matrices are no linear maps of activations. Names that end in Norm are told by that.
_NOT_LINEAR = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
# Recurrent layers keep a list of their weights beside their parameters, and parametrized ones compute theirs.
_OUT_OF_REACH = (nn.RNNBase, nn.RNNCellBase, ParametrizationList, nn.Bilinear)
# Parameters of modules of one's own that are tables or offsets, by their usual names.
_TABLE = re.compile(r"bias|emb|pos|token|gamma|beta|scale|mask|quer(y|ies)$|proto|centroid")
# By class and parameter: dimensions that run over inputs, where these are not all but the first.
_INPUTS = {
    "Conv1D": {"weight": (0,)},
    "XLNetRelativeAttention": {"q": (0,), "k": (0,), "v": (0,), "r": (0,), "o": (1, 2)},
}


class MixoutMatrix(NamedTuple):
    """One matrix.

    Attributes:
        name: plain name of the parameter.
        owner: the module that keeps it.
        key: its name there.
        inputs: dimensions that run over inputs; None for all but the first.
    """

    name: str
    owner: nn.Module
    key: str
    inputs: tuple[int, ...] | None


Choice = Callable[[str, nn.Module], bool]


def find_matrices(module: nn.Module, choice: Choice | None = None) -> tuple[list[MixoutMatrix], list[str]]:
    """Return the trainable matrices of linear maps, tied ones under one name, and the names of those out of reach.

    Args:
        module: the module.
        choice: which submodules are asked, by name and module; when None, all whose matrices are linear maps: linear
            layers, attention with matrices of its own, and parameters of modules of one's own with two or more dimensions
            whose names do not say that they are tables.
    """
    found: list[MixoutMatrix] = []
    missed: list[str] = []
    names: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        prefix = plain_name(prefix)
        if isinstance(owner, _NOT_LINEAR) or type(owner).__name__.endswith("Norm"):
            continue
        if choice is not None and not choice(prefix, owner):
            continue
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.requires_grad or nn.parameter.is_lazy(parameter):
                continue
            if parameter.dim() < 2 or not parameter.is_floating_point() or _TABLE.search(key):
                continue
            name = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
            if isinstance(owner, _OUT_OF_REACH):
                missed.append(name)
                continue
            found.append(MixoutMatrix(name, owner, key, _INPUTS.get(type(owner).__name__, {}).get(key)))
    return found, missed
