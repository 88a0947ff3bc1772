"""An adapter's folder: `adapter_config.json` beside `adapter_model.safetensors` or `adapter_model.bin`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from soups.errors import StorageError
from soups.stores.checkpoint import TorchStore
from soups.stores.safetensors import SafetensorsStore

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path) -> SafetensorsStore | TorchStore:
    """Open an adapter's tensors.

    Raises:
        StorageError: the folder holds none.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsStore(folder / WEIGHTS)
    if (folder / _PICKLED).is_file():
        return TorchStore(folder / _PICKLED)
    there = sorted(file.name for file in folder.iterdir())[:8] if folder.is_dir() else []
    kohya = (
        " diffusers' pytorch_lora_weights files are not read." if any("pytorch_lora" in name for name in there) else ""
    )
    raise StorageError(
        f"{folder} is no LoRA adapter in PEFT's format: it has neither {WEIGHTS} nor {_PICKLED}; it has {there}.{kohya} Name "
        f"the folder that PEFT's save_pretrained wrote."
    )


def base_of(adapter: Path) -> Path:
    """Return the folder or file of the model that an adapter was trained on, by what the adapter says.

    The place is looked for as it is written, below the adapter's folder, and in the cache of the Hugging Face Hub.

    Raises:
        StorageError: the adapter names no base, or one that is not on this machine.
    """
    try:
        content = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        settings = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{adapter / CONFIG} cannot be read ({error}). Copy the adapter again.") from error
    named = settings.get("base_model_name_or_path")
    if not named:
        raise StorageError(
            f"{adapter} is a LoRA adapter, not a whole model, and does not say which model it belongs to. Name that model as "
            f"well: BASE+ADAPTER."
        )
    for place in (Path(str(named)).expanduser(), adapter / str(named)):
        if place.exists() and place.resolve() != adapter.resolve():
            return place
    cached = _cached(str(named), settings.get("revision"))
    if cached is None:
        raise StorageError(
            f"{adapter} is a LoRA adapter of {str(named)!r}, which is not on this machine. Download that model, or name "
            f"another place of it: BASE+ADAPTER."
        )
    return cached


def _cached(name: str, revision: Any) -> Path | None:
    if find_spec("huggingface_hub") is None or name.count("/") > 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=str(revision) if revision else None)
    return Path(found).parent if isinstance(found, str) else None
