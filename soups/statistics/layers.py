"""Which inputs of which layers statistics are summed over, rule by rule; layers that no rule knows are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Rows = Callable[[Tensor], Tensor]
"""From a layer's input, any leading axes, to rows float (…, features), with the leading axes kept."""


@dataclass(frozen=True)
class Layer:
    """A layer with a weight whose inputs are summed over.

    Attributes:
        name: of the weight.
        module: whose forward receives the input.
        kind: "gram", "second_moment" or "frequency".
        size: of the sum: features of the input, or rows of the embedding.
        rows: makes rows of the input.
        groups: of a convolution; 1 elsewhere.
        axis: of the weight that meets the input: 1, or 0 where the weight is (in, out).
        spatial: rows are patches of an image or positions of a signal: a mask of tokens does not apply.
    """

    name: str
    module: nn.Module
    kind: str
    size: int
    rows: Rows
    groups: int = 1
    axis: int = 1
    spatial: bool = False

    @property
    def key(self) -> str:
        """The name of the statistic."""
        return f"{self.kind}/{self.name}"


def layers_of(module: nn.Module) -> Iterator[Layer]:
    """Yield the layers of a network that a rule knows; `nn.MultiheadAttention` apart, whose projections have no inputs to hook."""
    inside_attention = {
        id(part) for one in module.modules() if isinstance(one, nn.MultiheadAttention) for part in one.modules()
    }
    for prefix, one in module.named_modules():
        weight = getattr(one, "weight", None)
        if id(one) in inside_attention or not isinstance(weight, Tensor):
            continue
        found = _layer(f"{prefix}.weight" if prefix else "weight", one, weight)
        if found is not None:
            yield found


def _layer(name: str, module: nn.Module, weight: Tensor) -> Layer | None:
    if isinstance(module, nn.Linear):
        return Layer(name, module, "gram", weight.shape[1], lambda x: x)
    if type(module).__name__ == "Conv1D" and weight.ndim == 2 and not isinstance(module, nn.Conv1d):
        return Layer(name, module, "gram", weight.shape[0], lambda x: x, axis=0)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and not module.transposed:
        size = weight[0].numel()
        return Layer(name, module, "gram", size, _patches(module), groups=module.groups, spatial=True)
    if isinstance(module, nn.Embedding):
        return Layer(name, module, "frequency", weight.shape[0], lambda x: x)
    if isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        if len(shape) == 1:
            return Layer(name, module, "second_moment", shape[0], lambda x: functional.layer_norm(x, shape, eps=eps))
    if "RMSNorm" in type(module).__name__ and weight.ndim == 1:
        eps = _epsilon(module)
        if eps is not None:
            return Layer(name, module, "second_moment", weight.numel(), lambda x: _rms_normalised(x, eps))
    return None


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return torch.finfo(torch.float32).eps if isinstance(module, nn.RMSNorm) else None


def _rms_normalised(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _patches(module: nn.Conv1d | nn.Conv2d) -> Rows:
    """Return a function from inputs (B, channels, …) to patches (B, positions, groups · features)."""

    def unfolded(x: Tensor) -> Tensor:
        two = isinstance(module, nn.Conv2d)
        kernel, stride, dilation = (
            pair if two else (1, *pair) for pair in (module.kernel_size, module.stride, module.dilation)
        )
        reach: list[int] = module._reversed_padding_repeated_twice  # pyright: ignore[reportPrivateUsage]
        if not two:
            x = x.unsqueeze(2)
            reach = [*reach, 0, 0]
        if any(reach):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = functional.pad(x, reach, mode=mode)
        if kernel == (1, 1):
            return x[..., :: stride[0], :: stride[1]].flatten(2).transpose(1, 2)
        return functional.unfold(
            x, cast(Any, kernel), dilation=cast(Any, dilation), stride=cast(Any, stride)
        ).transpose(1, 2)

    return unfolded
