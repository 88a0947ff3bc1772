"""Small networks of every kind that the collector knows, in float64, with their data."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions (strided, grouped, 1x1, dilated), BatchNorm, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=2, groups=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 2, dilation=2, padding=1, padding_mode="circular"),
        )  # fmt: skip
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Vit(nn.Module):
    """A transformer of `nn.MultiheadAttention` over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x)).mean(1))


def texts(vocabulary: int, count: int = 6) -> list[dict[str, Tensor]]:
    """Token ids of different lengths, one example each."""
    source = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(3, vocabulary, (1, 3 + number % 4), generator=source)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([number % 3])})
    return found


def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples as one batch, padded on the right with the token 0."""
    longest = max(one["input_ids"].shape[1] for one in examples)
    batch = {
        key: torch.cat([nn.functional.pad(one[key], (0, longest - one[key].shape[1])) for one in examples])
        for key in ("input_ids", "attention_mask")
    }
    return batch | {"labels": torch.cat([one["labels"] for one in examples])}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    )


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=12, tie_word_embeddings=True, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def made(name: str) -> tuple[nn.Module, list[Any]]:
    """A network in float64 and evaluation mode, and its examples, one a batch."""
    torch.manual_seed(0)
    if name == "mlp":
        module: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        data: list[Any] = [[torch.randn(1, 4).double(), torch.tensor([n % 3])] for n in range(6)]
    elif name == "conv":
        module = ConvNet()
        data = [[torch.randn(1, 2, 6, 6).double(), torch.tensor([n % 3])] for n in range(6)]
    elif name == "vit":
        module = Vit()
        data = [[torch.randn(1, 5, 4).double(), torch.tensor([n % 3])] for n in range(6)]
    else:
        module, data = {"bert": bert, "gpt2": gpt2, "llama": llama}[name](), texts(30)
    return module.double().eval(), data


NAMES = ("mlp", "conv", "vit", "bert", "gpt2", "llama")
