"""Settings of single layers in a `config.json`, brought to the layers of a stack: each output layer keeps its source's.

A list with an entry for each layer (`layer_types` of Qwen, Gemma and others, `num_key_value_heads` of OpenELM), a text with a
letter for each (`hybrid_override_pattern`), and a list of layer numbers (`mlp_only_layers`, `cross_attention_layers`) follow the
source layers. A rule by numbers (`sliding_window_pattern: 6`, `first_k_dense_replace: 1`) cannot follow them, and is refused
where it would mean other layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from soups.errors import ConfigError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
# Lists that may be as long as there are layers, and are about something else.
_OTHER_LISTS = re.compile(
    r"architectures|_ids?$|_tokens?$|label|image|pixel|grid|patch_size|tile_size|shape|factor|mrope|languages|dtype"
)
_NUMBERED = re.compile(r"(_layers|_layer_indices|_layer_ids|_layer_idx|_layers_idx|_attn_idxs|_indices|_block_ids)$")
_PATTERNS = ("hybrid_override_pattern",)
# Settings whose number tells the kinds of layers, by rule, and the lists that tell the same layer by layer and count instead.
_ATTENTION, _MIXTURE = ("layer_types", "layers_block_type"), ("mlp_layer_types", "moe_layers")
# Every so many layers from the first one.
_PERIODS = {
    **dict.fromkeys(
        ("sliding_window_pattern", "full_attention_interval", "attn_layer_period", "global_attn_every_n_layers"), _ATTENTION
    ),
    **dict.fromkeys(
        ("expert_layer_period", "decoder_sparse_step", "encoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"),
        _MIXTURE,
    ),
    "no_rope_layer_interval": ("no_rope_layers",),
    **dict.fromkeys(("cross_attn_every_n_layers", "cross_layer_interval", "cross_attention_frequency"), ()),
}  # fmt: skip
# So many first layers are of one kind.
_FIRST = {
    "max_window_layers": _ATTENTION,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), _MIXTURE),
}
# So many last layers are of one kind.
_LAST = {"num_kv_shared_layers": ()}
# A list of kinds that is repeated.
_CYCLES = {"block_types": _ATTENTION}
_RULES: dict[str, tuple[str, ...]] = {**_PERIODS, **_FIRST, **_LAST, **_CYCLES}
_UNUSED = {"max_window_layers": "use_sliding_window"}

Config = Mapping[str, Any]
Layer = tuple[Config, int]
"""A source layer: its model's config.json, and its number there."""


def layer_count(config: Config) -> int | None:
    """Return how many layers a configuration (or its text_config) says that there are."""
    for part in (config, config.get("text_config")):
        for key in LAYER_COUNTS:
            if isinstance(part, Mapping) and isinstance(part.get(key), int):
                return int(cast("Config", part)[key])
    return None


def follow_layers(config: Config, stack: Sequence[Sequence[Layer]], where: str) -> dict[str, Any]:
    """Return a configuration for a stack of layers, the count included.

    Args:
        config: the donor's.
        stack: for each layer of the output, the layers that it is merged from; the donor's first, if it is among them.
        where: the donor's file, for messages.

    Raises:
        ConfigError: layers that are merged have different settings, or a period would mean other layers.
    """
    changed = dict(config)
    for key in LAYER_COUNTS:
        if isinstance(changed.get(key), int):
            changed[key] = len(stack)
    for key, value in config.items():
        if key == "text_config" and isinstance(value, Mapping):
            inner = [[(_text(one), layer) for one, layer in layers] for layers in stack]
            changed[key] = follow_layers(cast("Config", value), inner, where)
        elif _is_by_layer(config, key, value):
            entries = [
                _agreed(key, [one[key][layer] for one, layer in layers if _has(one, key, layer)], where)
                for layers in stack
            ]
            changed[key] = "".join(entries) if isinstance(value, str) else entries
        elif _is_numbers(config, key, value):
            chosen = [
                _agreed(key, [layer in one[key] for one, layer in layers if key in one], where) for layers in stack
            ]
            changed[key] = [number for number, inside in enumerate(chosen) if inside]
        elif key in _RULES and isinstance(value, int | list) and not isinstance(value, bool):
            _check_rule(config, key, cast("int | list[Any]", value), stack, where)
    return changed


def _text(config: Config) -> Config:
    inner = config.get("text_config")
    return cast("Config", inner) if isinstance(inner, Mapping) else config


def _is_by_layer(config: Config, key: str, value: Any) -> bool:
    count = layer_count(config)
    if isinstance(value, str):
        return key in _PATTERNS and len(value) == count
    if _NUMBERED.search(key) and value == list(range(count or 0)) and len(value) > 2:
        return False  # the numbers of all layers
    return isinstance(value, list) and len(cast("list[Any]", value)) == count and not _OTHER_LISTS.search(key)


def _is_numbers(config: Config, key: str, value: Any) -> bool:
    if not isinstance(value, list) or not _NUMBERED.search(key):
        return False
    numbers = cast("list[Any]", value)
    count = layer_count(config) or 0
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < count for one in numbers)


def _has(config: Config, key: str, layer: int) -> bool:
    return key in config and layer < len(config[key])


def _agreed(key: str, values: Sequence[Any], where: str) -> Any:
    if not values:
        raise ConfigError(
            f"{where}: {key} lists a setting of each layer, and the model of some layer has no such list."
        )
    if any(value != values[0] for value in values):
        raise ConfigError(
            f"{where}: layers that differ in {key} ({values[0]!r} and {next(v for v in values if v != values[0])!r}) cannot be "
            f"merged with each other. Choose layer ranges whose layers are of one kind."
        )
    return values[0]


def _check_rule(config: Config, key: str, value: int | list[Any], stack: Sequence[Sequence[Layer]], where: str) -> None:
    """Refuse a stack in which a rule by numbers gives a layer another kind than its source has."""
    if any(isinstance(config.get(name), list) for name in _RULES[key]) or (
        key in _UNUSED and not config.get(_UNUSED[key])
    ):
        return
    if isinstance(value, list) != (key in _CYCLES) or value == [] or (key in _PERIODS and value in (0, 1)):
        return

    def kind(layer: int, count: int) -> Any:
        if isinstance(value, list):
            return value[layer % len(value)]
        if key in _LAST:
            return layer >= count - value
        return layer < value if key in _FIRST else layer % value

    for number, layers in enumerate(stack):
        if any(kind(layer, layer_count(one) or 0) != kind(number, len(stack)) for one, layer in layers):
            lists = "".join(f", or write {name} into the models' config.json" for name in _RULES[key][:1])
            raise ConfigError(
                f"{where}: {key}={value} tells by a layer's number what kind it is, and layer {number} of the output is not of "
                f"its source's kind. Choose layer ranges that keep every layer's kind{lists}."
            )
