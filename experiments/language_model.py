"""A small character-level transformer on real English text, for experiments on one CPU thread.

The text is CPython's own documentation (`pydoc_data.topics`, 465,000 characters), which needs no download. The last tenth is
held out.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from soups.tasks.language_modelling import Block, Windows, python_documentation

CONTEXT = 64


def text() -> tuple[Tensor, Tensor, int]:
    """Return training and held-out characters as indices, and the size of the alphabet."""
    whole = python_documentation()
    alphabet = sorted(set(whole))
    index = {character: number for number, character in enumerate(alphabet)}
    data = torch.tensor([index[character] for character in whole])
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], len(alphabet)


class LanguageModel(pl.LightningModule):
    """Predicts the next character; AdamW, linear warm-up, then cosine decay to `floor` of the peak.

    Args:
        peak: peak learning rate.
        steps: steps of the run.
        floor: share of the peak at the end; 1 keeps it constant.
        seed: seed of the initial weights and the order of the data.
        batch: windows in a batch.
    """

    def __init__(self, peak: float, steps: int, *, floor: float = 0.1, seed: int = 0, batch: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.peak, self.steps, self.floor, self.seed, self.batch = peak, steps, floor, seed, batch
        self.train_text, self.held_out, alphabet = text()
        width = 64
        self.tokens, self.places = nn.Embedding(alphabet, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet, bias=False)
        for parameter in (self.tokens.weight, self.places.weight):
            nn.init.normal_(parameter, std=0.02)

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a character."""
        x, y = windows[:, :-1], windows[:, 1:]
        hidden = self.tokens(x) + self.places(torch.arange(CONTEXT, device=x.device))
        return functional.cross_entropy(self.head(self.norm(self.blocks(hidden))).flatten(0, 1), y.flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the held-out loss."""
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.peak, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = self.steps // 20

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            share = (step - warmup) / max(1, self.steps - warmup)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return one epoch that is the whole run: random windows, drawn by the seed."""
        draw = torch.Generator().manual_seed(self.seed)
        places = torch.randint(len(self.train_text) - CONTEXT - 1, (self.steps * self.batch,), generator=draw)
        return DataLoader(Windows(self.train_text, places, CONTEXT), batch_size=self.batch)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return 256 windows spread over the held-out text."""
        places = torch.linspace(0, len(self.held_out) - CONTEXT - 2, 256).long()
        return DataLoader(Windows(self.held_out, places, CONTEXT), batch_size=64)


def quiet_trainer(steps: int, every: int, callbacks: list[Any]) -> pl.Trainer:
    """Return a Trainer that validates every so many steps and prints nothing."""
    return pl.Trainer(
        max_epochs=1, val_check_interval=every, callbacks=callbacks, accelerator="cpu", logger=False, limit_train_batches=steps,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
