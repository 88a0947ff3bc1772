"""What is known about names without a library: buffers that follow from the configuration, old names, embeddings."""

from __future__ import annotations

import re

import torch

from soups.stores.averages import plain_name
from soups.stores.store import TensorMeta

# Buffers that a model makes for itself; versions of one library differ in whether they save them.
_DERIVED = re.compile(
    r"(^|\.)(position_ids|inv_freq|original_inv_freq|cos_cached|sin_cached|relative_position_index|relative_coords_table|"
    r"attn_mask|causal_mask|masked_bias|embed_positions\.weights|embed_positions\._float_tensor)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|crossattention|self_attention)\.bias$")
_EMBEDDING = re.compile(r"embed|wte|shared|tok_|word_emb|lookup|(^|\.)w\.weight$", re.IGNORECASE)
_HEAD = re.compile(
    r"(^|\.)(lm_head|lm_head\.decoder|predictions\.decoder|embed_out|output|output_layer|output_projection|proj_out|lm_loss|"
    r"generator|generator_lm_head|vocab_projector|pred_layer\.proj)\.weight$"
)
_NORM = re.compile(r"(norm|ln)[^.]*\.$|(^|\.)ln_?\w*\.$", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def is_derived(name: str, meta: TensorMeta) -> bool:
    """Tell whether a tensor follows from the configuration, so that a checkpoint is whole without it.

    >>> is_derived("embeddings.position_ids", TensorMeta((1, 512), torch.int64))
    True
    >>> is_derived("h.0.attn.bias", TensorMeta((64,), torch.float32))
    False
    """
    if _DERIVED.search(name):
        return True
    # GPT-2's causal mask is called like a bias: (1, 1, n, n).
    mask = len(meta.shape) == 4 and meta.shape[:2] == (1, 1) and meta.shape[2] == meta.shape[3]
    return bool(_MASK.search(name)) and (mask or meta.dtype in (torch.bool, torch.uint8))


def modern(name: str) -> str:
    """Return today's name of a tensor that TensorFlow's, an older torch's or a wrapper's convention named.

    >>> modern("encoder.LayerNorm.gamma"), modern("conv.weight_g"), modern("layer_scale.gamma")
    ('encoder.LayerNorm.weight', 'conv.parametrizations.weight.original0', 'layer_scale.gamma')
    >>> modern("layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    name = plain_name(name)
    stem, last = name[: name.rfind(".") + 1], name.rpartition(".")[2]
    if last in ("gamma", "beta") and _NORM.search(stem):
        return f"{stem}{'weight' if last == 'gamma' else 'bias'}"
    if last in ("weight_g", "weight_v"):
        return f"{stem}parametrizations.weight.original{'0' if last == 'weight_g' else '1'}"
    return name


def is_embedding(name: str) -> bool:
    """Tell whether a name is that of an embedding of tokens."""
    return (
        bool(_EMBEDDING.search(name)) and "position" not in name and "type" not in name and "norm" not in name.lower()
    )


def is_head(name: str) -> bool:
    """Tell whether a name is that of an output head over a vocabulary, which many models tie to the embedding."""
    return bool(_HEAD.search(name))


def template(name: str) -> tuple[str, tuple[str, ...]]:
    """Return a name with its numbers left out, and the numbers.

    >>> template("h.3.mlp.experts.0.w1")
    ('h.*.mlp.experts.*.w1', ('3', '0'))
    """
    return _NUMBER.sub("*", name), tuple(_NUMBER.findall(name))


def filled(pattern: str, numbers: tuple[str, ...]) -> str:
    """Put numbers back into a template."""
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), pattern)
