"""Reward models: Hugging Face sequence classifiers with one output, as reinforcement-learning libraries load them."""

from __future__ import annotations

from typing import Any

from soups.errors import ConfigError
from soups.tasks.network import Network
from soups.tasks.preferences import CLASSES, RewardInput
from soups.tasks.text_models import huggingface_text
from soups.tasks.texts import TextInput


def reward_model(name: str, num_classes: int = 2, pretrained: bool = True, **options: Any) -> Network:
    """Build any Hugging Face encoder or decoder with one output, the reward of a text.

    It is the library's own architecture (for MiniLM `BertForSequenceClassification`, whose head reads the first token
    through the pooling layer that came with the weights), so that
    `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads what is made of it.

    Args:
        name, pretrained, options: as `soups.tasks.text_models.huggingface_text` takes them.
        num_classes: two: which text of a pair is preferred.

    Raises:
        ConfigError: the data are no pairs.
        soups.errors.DataError: the model cannot be had.
    """
    if num_classes != len(CLASSES):
        raise ConfigError(
            f"A reward model compares two texts, but the data have {num_classes} classes: use data=preferences."
        )
    network = huggingface_text(name, 1, pretrained, pooling="library", **options)
    assert isinstance(network.input, TextInput)
    return Network(network.module, RewardInput(network.input), network.head)
