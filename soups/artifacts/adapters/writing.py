"""Write an adapter in PEFT's format."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from soups.artifacts.adapters.factors import Pair
from soups.errors import StorageError
from soups.stores.files import fsync_file, fsync_folder, storage_errors
from soups.stores.lora.contents import without_wrappers
from soups.stores.lora.files import CONFIG, WEIGHTS
from soups.stores.writer import write_safetensors

_PREFIX = "base_model.model."


def write_adapter(
    out: Path,
    pairs: Mapping[str, Pair],
    *,
    wholes: Mapping[str, Tensor] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
    base: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA adapter that PEFT's `PeftModel.from_pretrained` loads. The scale α/r is 1 everywhere.

    Args:
        out: the folder to make.
        pairs: the factors by place.
        wholes: tensors that stand for the base's, by name.
        modules_to_save: the modules that `wholes` belong to.
        bias: which biases are among `wholes`, as in PEFT's `LoraConfig`.
        base: the base model's place or name.
        task_type: PEFT's, `"CAUSAL_LM"` say.
        overwrite: replace an adapter that is at `out`.

    Raises:
        StorageError: something is at `out` already, or the disk is full or read-only.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise StorageError(f"There is something at {out} already. Choose another place, or allow overwriting.")
    ranks = {without_wrappers(path): pair.rank for path, pair in pairs.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count, default=8)
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base, "task_type": task_type, "inference_mode": True, "r": common,
        "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0, "bias": bias,
        "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "target_modules": _targets(list(ranks)),
        "modules_to_save": list(modules_to_save) or None,
    }  # fmt: skip
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in (wholes or {}).items()}
    for path, pair in pairs.items():
        kind, leaf = ("lora_embedding_", "") if pair.embedding else ("lora_", ".weight")
        tensors[f"{_PREFIX}{path}.{kind}A{leaf}"] = pair.a.contiguous()
        tensors[f"{_PREFIX}{path}.{kind}B{leaf}"] = pair.b.contiguous()
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(out):
        temporary.mkdir(parents=True)
        try:
            write_safetensors(temporary / WEIGHTS, tensors, {"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            fsync_file(temporary / CONFIG)
            out.mkdir(exist_ok=True)
            for name in (WEIGHTS, CONFIG):
                (temporary / name).replace(out / name)
            fsync_folder(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _targets(modules: list[str]) -> list[str] | str:
    """Return the modules by name, or as an expression where one name is the end of another."""
    known = set(modules)
    ambiguous = any(
        ".".join(name.split(".")[cut:]) in known for name in modules for cut in range(1, name.count(".") + 1)
    )
    return "|".join(re.escape(name) for name in modules) if ambiguous else sorted(modules)
