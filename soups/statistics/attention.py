"""Inputs of the projections of `nn.MultiheadAttention`, which no forward hook sees.

The module calls one function with all its weights: `in_proj_weight` belongs to no submodule, and `out_proj` is never called. Within
`watched`, that function is replaced by one that computes the projections one by one and shows their inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

See = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], None]
"""Called with a weight, the inputs (tokens, examples, in) that its equal parts of rows are applied to, and their outputs."""


@contextlib.contextmanager
def watched(see: See) -> Generator[None]:
    """Within the block, `see` is called for each weight of every `nn.MultiheadAttention` that is called.

    `in_proj_weight` is shown with three inputs: of queries, keys and values. The fused fast path, which shows nothing, is off
    within the block.
    """
    original: Callable[..., Any] = functional.multi_head_attention_forward
    fast = torch.backends.mha.get_fastpath_enabled()

    def forward(
        query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
        in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
        add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None, **more: Any,
    ) -> Any:  # fmt: skip
        width, inputs = embed_dim_to_check, (query, key, value)
        separate = more.pop("use_separate_proj_weight", False)
        owned: list[Tensor] = [more.pop(f"{name}_proj_weight", None) for name in "qkv"]
        weights = owned if separate else list(_given(in_proj_weight).split(width))
        biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.split(width))
        outputs = [functional.linear(*one) for one in zip(inputs, weights, biases, strict=True)]
        if separate:
            for weight, source, output in zip(weights, inputs, outputs, strict=True):
                see(weight, [source], [output])
        else:
            see(_given(in_proj_weight), inputs, outputs)
        same = torch.eye(width, dtype=query.dtype, device=query.device)
        heads, attention = original(
            *outputs, width, num_heads, None, None, bias_k, bias_v, add_zero_attn, dropout_p, same, None,
            use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same, v_proj_weight=same, **more,
        )  # fmt: skip
        result = functional.linear(heads, out_proj_weight, out_proj_bias)
        see(out_proj_weight, [heads], [result])
        return result, attention

    functional.multi_head_attention_forward = forward
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        functional.multi_head_attention_forward = original
        torch.backends.mha.set_fastpath_enabled(fast)


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight
