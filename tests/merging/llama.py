"""Tiny model folders in the Llama layout."""

import json

import torch
from safetensors.torch import save_file


def weights(seed, layers=4, hidden=64, inner=128, vocabulary=100):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.05 * torch.randn(shape, generator=generator)

    result = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": 1 + normal(hidden)}
    result["lm_head.weight"] = normal(vocabulary, hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        result |= {
            name + "input_layernorm.weight": 1 + normal(hidden),
            name + "post_attention_layernorm.weight": 1 + normal(hidden),
            name + "self_attn.q_proj.weight": normal(hidden, hidden),
            name + "self_attn.k_proj.weight": normal(hidden // 2, hidden),
            name + "self_attn.v_proj.weight": normal(hidden // 2, hidden),
            name + "self_attn.o_proj.weight": normal(hidden, hidden),
            name + "mlp.gate_proj.weight": normal(inner, hidden),
            name + "mlp.up_proj.weight": normal(inner, hidden),
            name + "mlp.down_proj.weight": normal(hidden, inner),
        }
    return result


def config(dtype, layers=4):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
    }


def write_family(root, dtype=torch.float32, count=3):
    """Write `base` and `m1` … into `root`: fine-tunes a little away from the base."""
    base = weights(0)
    for number in range(count + 1):
        moves = weights(number)
        model = {name: base[name] + 0.1 * (moves[name] - base[name]) for name in base} if number else base
        folder = root / (f"m{number}" if number else "base")
        folder.mkdir(parents=True)
        save_file(
            {k: v.to(dtype).contiguous() for k, v in model.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        (folder / "config.json").write_text(json.dumps(config(dtype)))
        (folder / "generation_config.json").write_text("{}")
    return root


def write_tokenizer(folder, tokens, added=()):
    """Write a word-level tokenizer: `tokens` get the ids from 0 on, `added` follow as special tokens."""
    entries = [
        {"id": len(tokens) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, token in enumerate(added)
    ]  # fmt: skip
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": tokens[0]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": tokens[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


VOCABULARIES = {
    "base": (["<unk>", "the", "cat", "sat"], ["<s>"]),
    "m1": (["<unk>", "cat", "the", "sat", "dog"], ["<s>", "<one>"]),
    "m2": (["<unk>", "the", "bird", "cat", "sat", "dog"], ["<two>"]),
}


def write_vocabularies(root, dtype=torch.float32, padded=0):
    """Write `base`, `m1` and `m2` with vocabularies of their own; embeddings get `padded` rows more than tokens."""
    for number, (name, (tokens, added)) in enumerate(VOCABULARIES.items()):
        folder = root / name
        folder.mkdir(parents=True)
        rows = len(tokens) + len(added) + padded
        model = {key: tensor.to(dtype) for key, tensor in weights(number, layers=1, vocabulary=rows).items()}
        save_file(model, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(dtype, layers=1) | {"vocab_size": rows}))
        write_tokenizer(folder, tokens, added)
    return root
