"""An adapter's folder: `adapter_config.json` beside `adapter_model.safetensors` or `adapter_model.bin`."""

from __future__ import annotations

from pathlib import Path

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
