"""What a collection will hold, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from soups.errors import ConfigError
from soups.statistics.layers import layers_of

_FLOAT64 = 8


def sizes(module: nn.Module, wanted: Sequence[str]) -> dict[str, int]:
    """Return the bytes that each kind of statistics takes in memory, in float64; shared inputs counted once a layer.

    >>> sizes(nn.Linear(10, 3), ["gram", "fisher"])
    {'gram': 800, 'fisher': 264}
    """
    found = dict.fromkeys(wanted, 0)
    for layer in layers_of(module):
        if layer.kind in found:
            square = layer.kind == "gram"
            numbers = layer.size**2 if square else layer.size
            found[layer.kind] += _FLOAT64 * layer.groups * numbers
        if "kfac_out" in found and layer.kind == "gram":
            weight = module.get_parameter(layer.name)
            found["kfac_out"] += _FLOAT64 * weight.shape[1 - layer.axis] ** 2
    for one in module.modules():
        if isinstance(one, nn.MultiheadAttention) and "gram" in found:
            found["gram"] += _FLOAT64 * 2 * one.embed_dim**2
    for kind in ("fisher", "gradient"):
        if kind in found:
            found[kind] = _FLOAT64 * sum(one.numel() for one in module.parameters() if one.is_floating_point())
    return found


def check_budget(module: nn.Module, wanted: Sequence[str], budget: int | None) -> None:
    """Check that the sums fit.

    Raises:
        ConfigError: they do not, naming the largest kind.
    """
    if budget is None:
        return
    found = sizes(module, wanted)
    total = sum(found.values())
    if total > budget:
        kind, most = max(found.items(), key=lambda item: item[1])
        raise ConfigError(
            f"These statistics take {total / 2**30:.2f} GiB of memory, of which {kind} {most / 2**30:.2f}; the budget is "
            f"{budget / 2**30:.2f} GiB. Raise it, or ask for fewer kinds."
        )
