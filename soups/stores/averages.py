"""Where averages lie in a checkpoint, and which tensor of its `state_dict` each averaged tensor stands for.

A Lightning checkpoint written under our callbacks has the key `weight_averages`: the averages by name, and `places`, the map
from keys of `state_dict` to the names under which tensors are averaged. The two differ when a hook renames keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from soups.errors import WeightsError

# The key of our averages in a Lightning checkpoint.
KEY = "weight_averages"

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """Return a tensor's name without the parts that `torch.compile` and distributed wrappers put into it.

    >>> plain_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    for mark in _WRAPPERS:
        name = name.replace(mark, "")
    return name


def sources(
    keys: Iterable[str],
    averaged: Collection[str],
    content: Mapping[str, Any],
    *,
    where: str,
    strict: bool = True,
) -> dict[str, str]:
    """Return for each key of a `state_dict` that is averaged the name under which the average holds it.

    Args:
        keys: the keys of the checkpoint's `state_dict`.
        averaged: names of the tensors that the average holds.
        content: the checkpoint's `weight_averages`: its `places`, or in checkpoints without them its `tied` names.
        where: the file, for messages.
        strict: whether every averaged tensor must have a place. Keys that the saving hook made of several tensors are
            refused in any case.

    Raises:
        WeightsError: an averaged tensor has no place among the keys, so the raw weights would stand in for it.
    """
    keys = list(keys)
    places: Mapping[str, str] | None = content.get("places")
    if places is None:
        tied: Mapping[str, str] = content.get("tied", {})
        places = {key: tied.get(plain_name(key), plain_name(key)) for key in keys}
    found = {key: places[key] for key in keys if places.get(key) in averaged}
    lost = sorted(set(averaged) - set(found.values()))
    unknown: list[str] = [key for key in content.get("unknown", []) if key in keys]
    if lost and (unknown or (strict and content.get("strict", True))):
        made = f" Its keys {unknown[:3]} belong to no tensor of the module as it was." if unknown else ""
        raise WeightsError(
            f"{where}: the averaged tensor {lost[0]!r} ({len(lost)} of {len(averaged)}) has no place in the checkpoint's "
            f"state_dict, where the raw weights would stand in for it.{made} A state_dict() or on_save_checkpoint() of the "
            f"module drops or rebuilds it. Keep its tensors as they are (any name will do), set strict_loading = False in a "
            f"module that leaves tensors out on purpose, or read the rest with load_averaged(path, which, strict=False)."
        )
    return found
