"""A classifier from any library, with what the rest needs to know of it: how it is fed, and which layer is its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import nn

from soups.errors import ConfigError, DataError, did_you_mean
from soups.tasks.data import Input

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """A classifier and its input.

    Attributes:
        module: maps the batches of `input` to logits (B, classes), or to an object with them under `logits`.
        input: how samples become its batches.
        head: name of the final linear layer.
    """

    module: nn.Module
    input: Input
    head: str

    def linear(self) -> nn.Linear:
        """Return the final linear layer."""
        return cast(nn.Linear, self.module.get_submodule(self.head))


def from_hub(name: str, build: Callable[[], T]) -> T:
    """Build a model, or its configuration or tokenizer, with one error for all the ways in which a hub cannot be reached.

    Raises:
        DataError: the files cannot be had from here.
    """
    try:
        return build()
    except Exception as error:
        # The hubs' clients raise their own families of errors for one cause: the file cannot be had from here.
        network = (
            "LocalEntryNotFound",
            "HfHubHTTP",
            "RepositoryNotFound",
            "OfflineMode",
            "URLError",
            "ConnectionError",
        )
        names = [kind.__name__ for kind in type(error).__mro__]
        if any(name.startswith(network) or name in ("ConnectError", "HTTPError", "OSError") for name in names):
            raise DataError(
                f"Cannot get {name}: {' '.join(str(error).split())} Offline? Fetch it on a machine with a network and give its path "
                f"(`model.pretrained=/path/to/weights.safetensors`, or a folder for Hugging Face models), or start from "
                f"random weights (`model.pretrained=false`)."
            ) from error
        raise


def last_linear(module: nn.Module, width: int | None = None) -> str:
    """Return the name of a model's last linear layer, or of its last one with `width` outputs.

    Raises:
        ConfigError: there is none.
    """
    names = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and (width is None or part.out_features == width)
    ]
    if not names:
        raise ConfigError(
            f"{type(module).__name__} has no linear layer{f' with {width} outputs' if width else ''} to take as its head. "
            f"Name it: model.head=…"
        )
    return names[-1]


def make_network(module: nn.Module, input: Input, num_classes: int, head: str | None) -> Network:
    """Return a network, after a look at its head.

    Raises:
        ConfigError: the head does not exist, or is no linear layer with `num_classes` outputs.
    """
    head = head or last_linear(module, num_classes)
    try:
        layer = module.get_submodule(head)
    except AttributeError:
        linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        raise ConfigError(f"The model has no layer {head!r} (model.head): {did_you_mean(head, linear)}") from None
    if not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
        raise ConfigError(f"model.head={head} must be a linear layer with {num_classes} outputs; it is {layer}.")
    return Network(module, input, head)
