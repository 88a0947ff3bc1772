"""Adapters of stacked experts (`target_parameters`), on bases that keep the experts together or one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from soups.errors import WeightsError
from soups.stores.lora.changes import Change, Experts, LowRank, OneExpert
from soups.stores.lora.config import AdapterConfig
from soups.stores.lora.contents import Factors
from soups.stores.lora.layout import Layouts
from soups.stores.store import Store

Find = Callable[[str], "str | None"]
# A stacked parameter, and the matrices of one expert that it holds one after another.
_PARTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}


def expert_changes(
    base: Store,
    adapter: Store,
    config: AdapterConfig,
    factors: Factors,
    wrapped: int,
    parameters: Sequence[str],
    find: Find,
    layouts: Layouts,
) -> list[tuple[str, Change]]:
    """Return what factors of a bare parameter do to the base's tensors; nothing if they are no such factors.

    Args:
        base, adapter: the stores.
        config: the adapter's configuration.
        factors: at one place.
        wrapped: how many places the module has: one for each adapted parameter.
        parameters: the names of the module's adapted parameters.
        find: the base's name of a tensor.
        layouts: decides the layout of square matrices.

    Raises:
        WeightsError: the parameter that the factors belong to cannot be told, or the rank is another.
    """
    if not parameters:
        return _into_a_stack(base, adapter, config, factors, find)
    keys = factors.keys
    a, b = adapter.meta(keys["lora_A"]).shape, adapter.meta(keys["lora_B"]).shape
    fitting: list[tuple[str, list[tuple[str, Change]]]] = []
    for parameter in dict.fromkeys(parameters):
        name = f"{factors.module}.{parameter}"
        rank, scale = config.rank(name), config.scale(name)
        stacked = find(name)
        if stacked is not None:
            shape = base.meta(stacked).shape
            count = shape[0] if len(shape) == 3 else 1
            if len(shape) not in (2, 3) or a[0] != rank * count:
                continue
            straight, turned = (b[0], a[1]) == shape[-2:], (a[1], b[0]) == shape[-2:] and len(shape) == 3
            if straight or turned:
                transposed = turned and (not straight or layouts.transposed(name))
                if straight and not turned and len(shape) == 2:
                    fitting.append((parameter, [(stacked, LowRank(keys["lora_A"], keys["lora_B"], scale, "linear"))]))
                    continue
                if straight != turned:
                    layouts.see(name, transposed=transposed)
                fitting.append(
                    (parameter, [(stacked, Experts(keys["lora_A"], keys["lora_B"], scale, count, transposed))])
                )
        elif found := _one_by_one(base, keys, a, b, name, parameter, rank, scale, find):
            fitting.append((parameter, found))
    if not fitting:
        return []
    if len(fitting) > 1 or wrapped > len(set(parameters)):
        raise WeightsError(
            f"{adapter.location}: {keys['lora_A']!r} may belong to any of the parameters {[name for name, _ in fitting]} of "
            f"{factors.module!r}, which have one shape. Merge the adapter with PEFT."
        )
    return fitting[0][1]


def _one_by_one(
    base: Store,
    keys: dict[str, str],
    a: tuple[int, ...],
    b: tuple[int, ...],
    name: str,
    parameter: str,
    rank: int,
    scale: float,
    find: Find,
) -> list[tuple[str, Change]]:
    """Return the changes for a base that keeps each expert's matrices apart."""
    module = name.rpartition(".")[0]
    for leaves in _PARTS.get(parameter, ()):
        count, changes = 0, list[tuple[str, Change]]()
        while (first := find(f"{module}.{count}.{leaves[0]}.weight")) is not None:
            for part, leaf in enumerate(leaves):
                target = first if part == 0 else find(f"{module}.{count}.{leaf}.weight")
                if target is None or base.meta(target).shape != (b[0] // len(leaves), a[1]):
                    return []
                changes.append(
                    (target, Experts(keys["lora_A"], keys["lora_B"], scale, 0, False, count, part, len(leaves)))
                )
            count += 1
        if count and a[0] == rank * count:
            return [
                (target, Experts(one.first, one.second, scale, count, False, one.expert, one.part, one.parts))
                for target, one in changes
                if isinstance(one, Experts)
            ]
    return []


def _into_a_stack(
    base: Store, adapter: Store, config: AdapterConfig, factors: Factors, find: Find
) -> list[tuple[str, Change]]:
    """Return the change for one expert's factors on a base that stacks the experts."""
    match = re.fullmatch(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)", factors.module)
    if match is None or find(f"{factors.module}.weight") is not None:
        return []
    a, b = adapter.meta(factors.keys["lora_A"]).shape, adapter.meta(factors.keys["lora_B"]).shape
    for parameter, choices in _PARTS.items():
        leaves = next((one for one in choices if match["leaf"] in one), None)
        target = find(f"{match['stack']}.{parameter}")
        if leaves is None or target is None:
            continue
        shape, expert = base.meta(target).shape, int(match["expert"])
        if len(shape) == 3 and expert < shape[0] and (b[0] * len(leaves), a[1]) == shape[1:]:
            keys, module = factors.keys, factors.module
            change = LowRank(
                keys["lora_A"], keys["lora_B"], config.scale(module), "linear", keys.get("lora_magnitude_vector")
            )
            return [(target, OneExpert(change, expert, leaves.index(match["leaf"]), len(leaves)))]
    return []
