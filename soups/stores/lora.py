"""A PEFT LoRA adapter applied to a base model, tensor by tensor.

W' = W + s · B A  (LoRA, arXiv:2106.09685, section 4.1), with s = alpha / r, or alpha / √r where the adapter was trained with
rsLoRA (arXiv:2312.03732). Ranks and alphas by pattern, embeddings, convolutions, `fan_in_fan_out` and fully trained modules
(`modules_to_save`) follow the adapter's configuration; DoRA and learned biases are refused rather than half applied.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from soups.errors import StorageError, WeightsError
from soups.stores.checkpoint import TorchStore
from soups.stores.safetensors import SafetensorsStore
from soups.stores.store import Store, TensorMeta

_PREFIX = "base_model.model."


class LoRAStore(Store):
    """A base model's store with an adapter merged in while reading.

    A tensor that the adapter changes is computed whole and kept until another one is asked for; others are read as they are.

    Args:
        base: the model that the adapter was trained on; closed with this store.
        adapter: the adapter's folder (`adapter_config.json` and `adapter_model.safetensors` or `.bin`).

    Raises:
        StorageError: the folder is no LoRA adapter, or one of a kind that cannot be applied by addition.
        WeightsError: the adapter's tensors do not fit the base.
    """

    def __init__(self, base: Store, adapter: str | os.PathLike[str]) -> None:
        folder = Path(adapter)
        self.base = base
        self._adapter = _open_adapter(folder)
        self.location = f"{base.location}+{adapter}"
        self.metadata = base.metadata
        self._lock = threading.Lock()
        self._kept: tuple[str, Tensor] | None = None
        try:
            self._config = _read_config(folder)
            self._pairs: dict[str, tuple[str, str]] = {}
            self._replaced: dict[str, str] = {}
            self._match(set(base.keys()))
        except BaseException:
            self.close()
            raise

    def _match(self, base_keys: set[str]) -> None:
        tied = self.base.tied()
        for key in self._adapter:
            name = key.removeprefix(_PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_(A|embedding_A)(?:\.default)?(\.weight)?", name):
                module, kind = match[1], match[2]
                partner = key.replace(f"lora_{kind}", f"lora_{kind[:-1]}B")
                target = self._target(f"{module}.weight", base_keys)
                self._pairs[tied.get(target, target)] = (key, partner)
                self._check_pair(target, key, partner)
            elif re.search(r"\.lora_(B|embedding_B)(\.default)?(\.weight)?$", name):
                continue
            elif "lora_magnitude" in name:
                raise StorageError(
                    f"{self._adapter.location} is a DoRA adapter, which is not supported. Merge it with PEFT."
                )
            else:  # a module trained in full; PEFT keeps it as `module.modules_to_save[.default].weight` or under its own name
                plain = re.sub(r"\.modules_to_save(\.default)?", "", name).replace(".base_layer", "")
                self._replaced[self._target(plain, base_keys)] = key

    def _target(self, name: str, base_keys: set[str]) -> str:
        for candidate in (
            name,
            name.replace(".weight", ".base_layer.weight"),
            f"model.{name}",
            name.removeprefix("model."),
        ):
            if candidate in base_keys:
                return candidate
        raise WeightsError(
            f"{self._adapter.location} changes {name!r}, which {self.base.location} does not have. The adapter was trained "
            f"on another model; name that one as the base."
        )

    def _check_pair(self, target: str, first: str, second: str) -> None:
        if second not in set(self._adapter):
            raise WeightsError(f"{self._adapter.location} has {first!r} without {second!r}. Copy or make it again.")
        if self._product_shape(first, second) not in (self._shape(target), self._shape(target)[::-1]):
            raise WeightsError(
                f"{self._adapter.location}: {first!r} times {second!r} has shape {self._product_shape(first, second)}, but "
                f"{target!r} of {self.base.location} has {self._shape(target)}. The adapter belongs to another model."
            )

    def _shape(self, target: str) -> tuple[int, ...]:
        return self.base.meta(target).shape

    def _product_shape(self, first: str, second: str) -> tuple[int, ...]:
        a, b = self._adapter.meta(first).shape, self._adapter.meta(second).shape
        return (b[0], *a[1:])

    def keys(self) -> list[str]:
        """Return the base's names."""
        return self.base.keys()

    def meta(self, key: str) -> TensorMeta:
        """Return shape and dtype of the base's tensor."""
        return self.base.meta(key)

    def tied(self) -> dict[str, str]:
        """Map each tied name to the name it repeats."""
        return self.base.tied()

    def identity(self, key: str) -> str | None:
        """Return the identity of the base's tensor and of what the adapter does to it."""
        key = self.base.tied().get(key, key)
        own = self.base.identity(key)
        if own is None or (key not in self._pairs and key not in self._replaced):
            return own
        parts = self._pairs.get(key, (self._replaced.get(key, ""),))
        return "+".join(
            [own, *(str(self._adapter.identity(part)) for part in parts), repr(sorted(self._config.items()))]
        )

    def changed(self) -> list[str]:
        """Return the names of the tensors that the adapter changes."""
        return [*self._pairs, *self._replaced]

    def read_flat(self, key: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return elements `start:stop` of the adapted tensor."""
        key = self.base.tied().get(key, key)
        if key in self._replaced:
            return self._adapter.read_flat(self._replaced[key], start, stop, out).to(self.meta(key).dtype)
        if key not in self._pairs:
            return self.base.read_flat(key, start, stop, out)
        with self._lock:
            if self._kept is None or self._kept[0] != key:
                self._kept = None
                self._kept = (key, self._adapted(key))
            return self._kept[1].reshape(-1)[start:stop]

    def _adapted(self, key: str) -> Tensor:
        weight = self.base.read(key)
        first, second = self._pairs[key]
        a, b = self._adapter.read(first).float(), self._adapter.read(second).float()
        rank = a.shape[1] if "embedding" in first and self._config.get("fan_in_fan_out") else a.shape[0]
        product = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
        if "embedding" in first or self._config.get("fan_in_fan_out") or product.shape != weight.shape:
            product = product.T
        return (weight.float() + self._scale(key, rank) * product).to(weight.dtype)

    def _scale(self, key: str, rank: int) -> float:
        module = key.removesuffix(".weight")
        patterns = cast("dict[str, float]", self._config.get("alpha_pattern") or {})
        alpha = float(self._config.get("lora_alpha", rank))
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def close(self) -> None:
        """Close both."""
        self.base.close()
        self._adapter.close()


def _open_adapter(folder: Path) -> SafetensorsStore | TorchStore:
    if (folder / "adapter_model.safetensors").is_file():
        return SafetensorsStore(folder / "adapter_model.safetensors")
    if (folder / "adapter_model.bin").is_file():
        return TorchStore(folder / "adapter_model.bin")
    raise StorageError(f"{folder} is no LoRA adapter: it has neither adapter_model.safetensors nor adapter_model.bin.")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{folder / 'adapter_config.json'} cannot be read ({error}). Copy the adapter again."
        ) from error
    config = cast("dict[str, Any]", config)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise StorageError(f"{folder} is a {config['peft_type']} adapter; only LoRA can be added to weights.")
    if config.get("use_dora") or config.get("bias", "none") != "none":
        what = "uses DoRA" if config.get("use_dora") else f"trained biases (bias={config['bias']!r})"
        raise StorageError(
            f"{folder} {what}, which is not supported. Merge it into its base with PEFT and name the result."
        )
    return config
