"""Rewards of what language models write, with the signature of TRL's: reward(prompts, completions, **more) → numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch

from soups.errors import ConfigError, DataError
from soups.tasks.network import from_hub
from soups.tasks.text_models import load_tokenizer, quiet_loading


def text_of(content: Any) -> str:
    """Return a prompt or completion as text: itself, or the contents of its messages, a line each."""
    return content if isinstance(content, str) else "\n".join(str(message["content"]) for message in content)


def brevity(prompts: Sequence[Any], completions: Sequence[Any], **more: Any) -> list[float]:
    """Return −log(1 + words) of each completion, at most 0.

    >>> brevity(["a", "a"], ["b", "b c d"])
    [-0.6931471805599453, -1.3862943611198906]
    """
    del prompts, more
    return [-math.log1p(len(text_of(one).split())) for one in completions]


class RewardModel:
    """A Hugging Face sequence classifier with one output as a reward: its logit for prompt and completion.

    What WARM exports is one. The model is loaded with the first call.

    Args:
        model: a folder or a Hub name.
        batch_size: texts at once.
        size: most tokens of a text; longer ones lose their end.
        prompt: show the model the prompt as well.
        device: of torch; null takes CUDA where there is any.
    """

    def __init__(
        self, model: str, batch_size: int = 32, size: int = 512, prompt: bool = True, device: str | None = None
    ) -> None:
        if batch_size < 1 or size < 1:
            raise ConfigError(f"A reward model needs batch_size and size above 0, not {batch_size} and {size}.")
        self.name, self.batch_size, self.size, self.prompt = model, batch_size, size, prompt
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[Any, Any] | None = None

    def _load(self) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            DataError: they cannot be had, or it is no reward model.
        """
        from transformers import AutoModelForSequenceClassification

        quiet_loading()
        tokenizer = load_tokenizer(self.name)
        model: Any
        model, found = from_hub(
            self.name,
            lambda: AutoModelForSequenceClassification.from_pretrained(
                self.name, dtype=torch.float32, output_loading_info=True
            ),
        )
        if model.config.num_labels != 1:
            raise DataError(f"{self.name} has {model.config.num_labels} outputs; a reward model has one.")
        if missing := sorted(cast(Any, found)["missing_keys"]):
            raise DataError(
                f"{self.name} holds no trained head: {missing[0]} is missing, so its rewards would be random."
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model.to(self.device).eval(), tokenizer

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **more: Any) -> list[float]:
        """Return the reward of each completion."""
        del more
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        texts = [
            self._text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            inputs = tokenizer(
                texts[start : start + self.batch_size], truncation=True, max_length=self.size, padding=True,
                return_tensors="pt",
            )  # fmt: skip
            inputs.pop("token_type_ids", None)  # GPT-2 would add embeddings for them; BERT takes zeros
            rewards += model(**inputs.to(self.device)).logits[:, 0].float().tolist()
        return rewards

    def _text(self, prompt: Any, completion: Any, tokenizer: Any) -> str:
        if not self.prompt:
            return text_of(completion)
        if isinstance(prompt, str):
            return prompt + text_of(completion)
        messages = [*prompt, *completion]
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return text_of(messages)


class Reward:
    """A reward under a name, whose results are checked.

    Args:
        name: shown to people, and to TRL.
        function: with TRL's signature, not asynchronous.

    Raises:
        ConfigError: it cannot be called as TRL calls rewards.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__, self._function = name, function
        if not callable(function):
            raise ConfigError(f"protocol.rewards.{name} makes {type(function).__name__}, which cannot be called.")
        parameters = inspect.signature(function).parameters.values()
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
            raise ConfigError(
                f"protocol.rewards.{name} must be a function (prompts, completions, **more): TRL gives it more than it may name."
            )
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise ConfigError(f"protocol.rewards.{name} is asynchronous; give a plain function.")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **more: Any) -> list[float]:
        """Return one number a completion.

        Raises:
            DataError: it gives something else.
        """
        found = list(self._function(prompts=prompts, completions=completions, **more))
        if len(found) != len(completions):
            raise DataError(
                f"The reward {self.__name__} gave {len(found)} numbers for {len(completions)} completions; it must give one each."
            )
        for number, one in enumerate(found):
            if not isinstance(one, Real) or not math.isfinite(one):
                raise DataError(
                    f"The reward {self.__name__} gave {one!r} for the completion {text_of(completions[number])[:60]!r}; it must "
                    f"give a finite number."
                )
        return [float(one) for one in found]
