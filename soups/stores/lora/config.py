"""An adapter's configuration: rank and scale of each module, and the settings that addition cannot follow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from soups.errors import StorageError
from soups.stores.lora.files import CONFIG

# Settings that decide nothing about the merged weights, beside the fields of `AdapterConfig`.
_HARMLESS = frozenset({
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
    "target_modules_to_tie", "merge_weights", "enable_lora", "_custom_modules",
})  # fmt: skip
_READ = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_rslora",
})  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA), which no fixed weight can express",
    "arrow_config": "chooses among experts by the input (Arrow), which no fixed weight can express",
    "kasa_config": "truncates the base weights first (KaSA)",
    "layer_replication": "repeats layers of its base (layer_replication), so that its base has another depth",
    "use_qalora": "pools its inputs (QA-LoRA), which PEFT cannot merge either",
}
# Initialisations that change the base weights before training, beyond those that can be computed again.
_CHANGED_BASE = {"corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_PROMPTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says about its tensors. Fields are called as in PEFT's `LoraConfig`.

    Attributes:
        r, lora_alpha: rank and scale's numerator, where no pattern says otherwise.
        rank_pattern, alpha_pattern: by regular expression at the end of a module's name.
        use_rslora: the scale is α/√r instead of α/r (arXiv:2312.03732).
        use_dora: directions and magnitudes are trained apart (arXiv:2402.09353).
        fan_in_fan_out: what PEFT recorded of the last targeted module: whether its weight has the shape (in, out).
        init: `"pissa"` or `"olora"`, where the base weights lost the product that training started from; else None.
        bias: `"none"`, `"all"` or `"lora_only"`: which biases were trained.
        modules_to_save: the ends of the names of modules trained in full.
        target_parameters: the ends of the names of bare parameters that were adapted.
        token_indices: rows of embeddings that were trained, by the end of the embedding's name; the key `""` is any.
        blocks: block-diagonal factors (BD-LoRA): parts of module names with a block-diagonal A, with B, and the count.
        text: everything, for fingerprints.
        base: the base model's place or name.
        task_type: PEFT's, where it was given.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    init: str | None
    bias: str
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    blocks: tuple[tuple[str, ...], tuple[str, ...], int]
    text: str
    base: str | None = None
    task_type: str | None = None

    def rank(self, module: str) -> int:
        """Return the rank of a module, by PEFT's rule for patterns."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return the factor of a module's product."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Tell whether a module, or one that it is in, was trained in full."""
        return any(re.fullmatch(rf"(.*\.)?{re.escape(end)}(\..*)?", module) for end in self.modules_to_save)

    def tokens(self, module: str) -> tuple[int, ...] | None:
        """Return the trained rows of an embedding; None if there are none."""
        for end, rows in self.token_indices.items():
            if not end or module == end or module.endswith(f".{end}"):
                return rows
        return None


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(folder: Path) -> AdapterConfig:
    """Read an adapter's configuration.

    Raises:
        StorageError: it cannot be read, is of a kind that changes no weights or not by addition, or has a setting that is
            unknown here.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("no object")
        settings = cast("dict[str, Any]", content)
        _check(folder, settings)
        return _parsed(settings)
    except (OSError, ValueError, TypeError, re.error) as error:
        raise StorageError(f"{path} cannot be read ({error}). Copy the adapter again.") from error


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("peft_type") or "LORA").upper()
    if kind in _PROMPTS:
        raise StorageError(
            f"{folder} is a {kind} adapter. It adds inputs and changes no weights, so there is nothing to merge."
        )
    if kind != "LORA":
        raise StorageError(
            f"{folder} is a {kind} adapter; only LoRA adapters are applied here. Merge it into its base with PEFT "
            f"(merge_and_unload), and name the merged folder."
        )
    for name, why in _REFUSED.items():
        if settings.get(name):
            raise StorageError(f"{folder} {why}. It cannot be applied here: merge it with PEFT where PEFT can.")
    unknown = sorted(
        name for name, value in settings.items() if value and name not in _HARMLESS | _READ | set(_REFUSED)
    )
    if unknown:
        raise StorageError(
            f"{folder / CONFIG} sets {unknown}, which this version does not know and which may change what the adapter does. "
            f"Merge it with the version of PEFT that wrote it ({settings.get('peft_version') or 'unknown'})."
        )
    start = str(settings.get("init_lora_weights") or "").lower()
    for prefix, name in _CHANGED_BASE.items():
        if start.startswith(prefix):
            raise StorageError(
                f"{folder} was initialised by {name}, which changes the base weights in a way that the adapter does not "
                f"record: added to the original base, it would give another model. Save it with PEFT's "
                f"path_initial_model_for_weight_conversion, or merge it with PEFT."
            )
    if start.startswith("pissa_niter"):
        raise StorageError(
            f"{folder} was initialised by PiSSA with a random decomposition ({start}), which cannot be computed again. Save "
            f"it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT."
        )
    if start in ("pissa", "olora") and settings.get("target_parameters"):
        raise StorageError(
            f"{folder} combines {start} with target_parameters, which is not supported. Merge it with PEFT."
        )


def _parsed(settings: Mapping[str, Any]) -> AdapterConfig:
    start = str(settings.get("init_lora_weights") or "").lower()
    blocks = cast("dict[str, Any]", settings.get("use_bdlora") or {})
    return AdapterConfig(
        r=int(_given(settings, "r", 8)),
        lora_alpha=float(_given(settings, "lora_alpha", 8)),
        rank_pattern={str(key): int(value) for key, value in (settings.get("rank_pattern") or {}).items()},
        alpha_pattern={str(key): float(value) for key, value in (settings.get("alpha_pattern") or {}).items()},
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        init=start if start in ("pissa", "olora") else None,
        bias=str(settings.get("bias") or "none"),
        modules_to_save=tuple(map(str, settings.get("modules_to_save") or ())),
        target_parameters=tuple(map(str, settings.get("target_parameters") or ())),
        token_indices=_tokens(settings.get("trainable_token_indices")),
        blocks=(
            tuple(blocks.get("target_modules_bd_a") or ()),
            tuple(blocks.get("target_modules_bd_b") or ()),
            int(blocks.get("nblocks") or 1),
        ),
        text=json.dumps(settings, sort_keys=True),
        base=settings.get("base_model_name_or_path") or None,
        task_type=settings.get("task_type") or None,
    )


def _given(settings: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number as it was given, zero included: α = 0 switches an adapter off."""
    value = settings.get(name)
    return default if value is None else value


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    if isinstance(value, dict):
        return {str(name): tuple(map(int, rows)) for name, rows in cast("dict[str, list[int]]", value).items()}
    return {"": tuple(map(int, value))}
