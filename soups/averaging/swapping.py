"""Put other weights into a module for a while, by exchanging pointers, and bring its own back whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from soups.errors import WeightsError, did_you_mean
from soups.stores.averages import plain_name
from soups.weights import Weights


def slots(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters and persistent buffers by plain name, tied ones once."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for prefix, layer in module.named_modules():
        absent = layer._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        named = [*layer._parameters.items(), *((n, b) for n, b in layer._buffers.items() if n not in absent)]  # pyright: ignore[reportPrivateUsage]
        for name, tensor in named:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = tensor
    return found


class Swap:
    """Other weights in place of a module's own, from `enter` to `exit`.

    Where dtype and device agree nothing is copied: the tensors' memory is exchanged. Sharded tensors (DTensor) are copied,
    since their shards are views of one buffer.

    Args:
        tensors: the module's tensors by name, as `slots` returns them.
    """

    def __init__(self, tensors: Weights) -> None:
        self._plain = [(name, tensor) for name, tensor in tensors.items() if not hasattr(tensor, "to_local")]
        self._sharded = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "to_local")}
        # What is out of place: name, the module's tensor, the memory that is its own, and the tensor's version then.
        self._own: list[tuple[str, Tensor, Tensor, int]] = []
        self._copied: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the module holds other weights now."""
        return bool(self._own or self._copied)

    def enter(self, weights: Weights) -> None:
        """Put `weights` in place. Names that the module does not have are left out; it must not be active already."""
        assert not self.active
        # Copies are made outside inference mode, so that they are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._plain:
                new = weights.get(name)
                if new is None:
                    continue
                own = tensor.data
                self._own.append((name, tensor, own, _version(tensor)))
                # `to` returns the same tensor where nothing is to be done.
                tensor.data = new.to(own)
            for name, tensor in self._sharded.items():
                if name in weights:
                    own = tensor.to_local()  # type: ignore[attr-defined]
                    self._copied[name] = own.clone()
                    own.copy_(weights[name])

    def exit(self) -> list[str]:
        """Bring the module's own weights back, and name the tensors that were written into meanwhile."""
        written: list[str] = []
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor, own, version in self._own:
                if _version(tensor) != version:
                    written.append(name)
                tensor.data = own
            for name, own in self._copied.items():
                self._sharded[name].to_local().copy_(own)  # type: ignore[attr-defined]
        self._own, self._copied = [], {}
        return written

    def raw(self) -> dict[str, Tensor]:
        """Return the module's own tensors that are out of place now, by name."""
        return {**{name: own for name, _, own, _ in self._own}, **self._copied}


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written into; exchanging its memory does not count."""
    return 0 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]


def _check(module: nn.Module, tensors: Weights, weights: Weights) -> None:
    """Refuse what would be left out in silence or break the module's shapes."""
    everything = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    known = {plain_name(name) for name, _ in everything}
    if unknown := [name for name in weights if name not in known]:
        raise WeightsError(
            f"The module has no tensor {unknown[0]!r} ({len(unknown)} of {len(weights)} names are unknown to it): "
            f"{did_you_mean(unknown[0], known)} Give weights of this architecture, under the module's own names."
        )
    for name, tensor in tensors.items():
        if name in weights and weights[name].shape != tensor.shape and not hasattr(tensor, "to_local"):
            raise WeightsError(
                f"Tensor {name!r} has shape {tuple(weights[name].shape)}, and the module's is {tuple(tensor.shape)}. "
                f"Give weights of this architecture."
            )


@contextlib.contextmanager
def averaged(module: nn.Module, weights: Weights) -> Generator[nn.Module]:
    """Within the block the module holds `weights` (an average's `value()`, or a state dict); afterwards its own again.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with averaged(layer, {"weight": torch.full((1, 1), 3.0)}):
    ...     inside = layer.weight.item()
    >>> inside, layer.weight.item() == 3.0
    (3.0, False)

    Raises:
        WeightsError: a name that the module does not have, or another shape; the module is as before.
    """
    tensors = slots(module)
    weights = {plain_name(name): tensor for name, tensor in weights.items()}
    _check(module, tensors, weights)
    swap = Swap(tensors)
    try:
        swap.enter(weights)
        yield module
    finally:
        swap.exit()
