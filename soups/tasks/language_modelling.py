"""Causal language models on real text: domains to train on, windows of tokens, a small transformer, and its training.

The small transformer reads characters and trains in minutes on one CPU thread; any Hugging Face causal model takes its place
(`huggingface_causal`). Domains need no download beyond the texts of the other tasks.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchmetrics.aggregation import MeanMetric

from soups.errors import DataError, did_you_mean
from soups.evaluation import forward
from soups.seeding import generator
from soups.tasks.network import from_hub
from soups.tasks.news import articles
from soups.tasks.optimisation import optimizer_and_schedule
from soups.tasks.rated_texts import rated_texts
from soups.tasks.text_models import load_config, quiet_loading

# Printable ASCII and the line's end: what the characters of a domain are mapped to, others to a question mark.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def python_documentation() -> str:
    """Return CPython's own documentation of its language, 465,000 characters of English (PSF licence)."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def _snippets(domain: str) -> str:
    return "\n".join(rated.text for rated in rated_texts(domain))


DOMAINS: dict[str, Callable[[], str]] = {
    "python": python_documentation,
    "news": lambda: "\n".join(article.body for article in articles()),
    "movies": partial(_snippets, "movies"),
    "amazon": partial(_snippets, "amazon"),
    "nyt": partial(_snippets, "nyt"),
    "tweets": partial(_snippets, "tweets"),
}

OPTIMIZER: dict[str, Any] = {
    "name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "warmup": 0.05, "schedule": "cosine", "floor": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Tokens of one domain, int64, cut into consecutive pieces: train, held-out and test."""

    train: Tensor
    heldout: Tensor
    test: Tensor


def corpus(domain: str, characters: int | None = None, heldout: float = 0.05, test: float = 0.1) -> Corpus:
    """Return a domain's characters as indices into `ALPHABET`.

    Args:
        domain: a key of `DOMAINS`.
        characters: take only the first so many.
        heldout, test: shares, from the end of the text.

    Raises:
        DataError: an unknown domain, or one that cannot be fetched.
    """
    if domain not in DOMAINS:
        raise DataError(f"There is no domain {domain!r}: {did_you_mean(domain, DOMAINS)}")
    tokens = encode(DOMAINS[domain]()[:characters])
    sizes = [round(share * len(tokens)) for share in (heldout, test)]
    return Corpus(*tokens.split([len(tokens) - sum(sizes), *sizes]))


def encode(text: str) -> Tensor:
    """Return the indices of a text's characters in `ALPHABET`, int64 (N,).

    >>> encode("a\\né").tolist() == [ALPHABET.index("a"), 0, ALPHABET.index("?")]
    True
    """
    index = {character: number for number, character in enumerate(ALPHABET)}
    unknown = index["?"]
    return torch.tensor([index.get(character, unknown) for character in text], dtype=torch.int64)


class Windows(Dataset[Tensor]):
    """Windows of `context + 1` tokens, int64, that begin at given places.

    Args:
        tokens: (N,).
        places: (M,).
        context: tokens that the model sees.
    """

    def __init__(self, tokens: Tensor, places: Tensor, context: int) -> None:
        self.tokens, self.places, self.context = tokens, places, context

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tensor:
        """Return window `number`, (context + 1,)."""
        at = int(self.places[number])
        return self.tokens[at : at + self.context + 1]


def random_windows(tokens: Tensor, count: int, context: int, seed: int, *names: str | int) -> Windows:
    """Return `count` windows at random places, drawn by the seed and names."""
    _check_length(tokens, context)
    return Windows(tokens, torch.randint(len(tokens) - context, (count,), generator=generator(seed, *names)), context)


def spread_windows(tokens: Tensor, count: int, context: int) -> Windows:
    """Return `count` windows spread evenly over a text."""
    _check_length(tokens, context)
    return Windows(tokens, torch.linspace(0, len(tokens) - context - 1, count).long(), context)


def _check_length(tokens: Tensor, context: int) -> None:
    if len(tokens) <= context:
        raise DataError(f"A text of {len(tokens)} tokens has no window of {context} + 1.")


class Block(nn.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """A small causal transformer with learned positions.

    Args:
        vocabulary: tokens.
        context: most tokens of a window.
        width, layers, heads: its size.
        seed: of the initial weights.
    """

    def __init__(
        self,
        vocabulary: int = len(ALPHABET),
        context: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            for parameter in (self.tokens.weight, self.places.weight):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits of the next token, (batch, time, vocabulary), for tokens (batch, time)."""
        hidden = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


def huggingface_causal(name: str, pretrained: bool = True, **options: Any) -> nn.Module:
    """Build any Hugging Face causal language model.

    Args:
        name: a Hub name or a folder.
        pretrained: take the weights; false builds the configuration at random.
        options: passed to the configuration.

    Raises:
        DataError: the model cannot be had.
    """
    from transformers import AutoModelForCausalLM

    quiet_loading()
    config = load_config(name, **options)
    if pretrained:
        return from_hub(name, lambda: AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32))
    return cast(nn.Module, AutoModelForCausalLM.from_config(config))


def token_losses(module: nn.Module, windows: Tensor) -> Tensor:
    """Return the cross-entropy of each next token in nats, (batch, time), for windows (batch, time + 1)."""
    logits = forward(module, {"input_ids": windows[:, :-1]})
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none").view(
        len(windows), -1
    )


@torch.inference_mode()
def mean_loss(module: nn.Module, windows: Windows, batch_size: int = 64) -> float:
    """Return the mean cross-entropy in nats a token of a model in evaluation mode; its exponential is the perplexity."""
    was_training = module.training
    module.eval()
    total, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch = torch.stack([windows[number] for number in range(start, min(start + batch_size, len(windows)))])
        losses = token_losses(module, batch).double()
        total, count = total + float(losses.sum()), count + losses.numel()
    module.train(was_training)
    return total / count


class LanguageModelling(lightning.LightningModule):
    """A causal model trained on windows.

    Args:
        model: maps `input_ids` to logits, or to an object that holds them.
        optimizer: as `soups.tasks.optimisation.optimizer_and_schedule` takes it; what is absent is `OPTIMIZER`'s.
    """

    def __init__(self, model: nn.Module, optimizer: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.settings = {**OPTIMIZER, **optimizer}
        self.heldout_loss = MeanMetric()

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Return the loss of windows (batch, time + 1)."""
        loss = token_losses(self.model, batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        """Score windows of the held-out text."""
        losses = token_losses(self.model, batch)
        self.heldout_loss.update(losses)
        self.log("heldout/loss", self.heldout_loss, batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule by step."""
        return optimizer_and_schedule(self.parameters(), self.settings, self.trainer.estimated_stepping_batches)
