"""Prompts for causal language models, and what the models write to them, drawn with a fixed seed.

A row is as TRL's trainers take it: "prompt", a text or a list of messages ({"role": …, "content": …}), and whatever else
rewards want to see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from soups.errors import ConfigError, DataError, did_you_mean
from soups.seeding import derive_seed
from soups.tasks.preferences import PARTS, parts
from soups.tasks.rated_texts import DOMAINS, RatedText
from soups.tasks.text_files import SEPARATORS, read_whole_rows

Row = dict[str, Any]


def prompt_file(path: str) -> list[Row]:
    """Return the prompts of a text file, one a line, or the rows of a `.csv`, `.tsv` or `.jsonl` file with "prompt".

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    place = Path(path).expanduser()
    if place.suffix in (*SEPARATORS, ".jsonl"):
        return check_rows([row for row, _ in read_whole_rows(place, ("prompt",))], str(place))
    if not place.is_file():
        raise DataError(f"There is no file {place}.")
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 ({error.reason}). Convert the file.") from error
    return check_rows([line for line in lines if line.strip()], str(place))


def rated_beginnings(
    domain: str = "movies", part: str = "members", count: int = 256, words: int = 4, split_seed: int = 0
) -> list[Row]:
    """Return the first words of rated texts as prompts, each beginning once; those that another part has too are left out.

    Args:
        domain: a key of `soups.tasks.rated_texts.DOMAINS`.
        part: one of `soups.tasks.preferences.PARTS`, which share no text and no review.
        count: prompts.
        words: of each; only longer texts are taken.
        split_seed: of the parts.

    Raises:
        DataError: an unknown domain or part, or too few texts.
    """
    if domain not in DOMAINS:
        raise DataError(f"There is no domain {domain!r} of rated texts: {did_you_mean(domain, DOMAINS)}")
    if part not in PARTS:
        raise DataError(f"There is no part {part!r} of rated texts: {did_you_mean(part, PARTS)}")

    def beginnings(texts: Sequence[RatedText]) -> list[str]:
        split = [one.text.split() for one in texts]
        return [" ".join(text[:words]) for text in split if len(text) > words]

    cut = parts(domain, split_seed)
    elsewhere = {one for name, texts in cut.items() if name != part for one in beginnings(texts)}
    found = [one for one in dict.fromkeys(beginnings(cut[part])) if one not in elsewhere][:count]
    if len(found) < count or count < 1:
        raise DataError(
            f"{domain} ({part}) has {len(found)} beginnings of {words} words to itself, and {count} are asked for."
        )
    return [{"prompt": prompt} for prompt in found]


def check_rows(rows: Sequence[Any], where: str) -> list[Row]:
    """Return rows, texts alone made to rows, after a look at their prompts.

    Args:
        rows: texts, or mappings with "prompt".
        where: they come from.

    Raises:
        DataError: there are none, or one has no prompt.
    """
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        own: Row = dict(cast(Mapping[str, Any], row)) if isinstance(row, Mapping) else {"prompt": row}
        prompt = own.get("prompt")
        text = isinstance(prompt, str) and bool(prompt.strip())
        if not text and not _is_conversation(prompt):
            raise DataError(
                f"{where}: prompt number {number} is {str(prompt)[:60]!r}; it must be some words, or a list of messages with role "
                f"and content."
            )
        found.append(own)
    if not found:
        raise DataError(f"{where} holds no prompts.")
    if len({isinstance(row["prompt"], str) for row in found}) > 1:
        raise DataError(f"{where}: some prompts are texts and some are messages; they must be of one kind.")
    if len({frozenset(row) for row in found}) > 1:
        raise DataError(f"{where}: not all rows have the same columns.")
    return found


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in cast(list[Any], prompt))
    )


@dataclass(frozen=True)
class Completions:
    """What a model wrote, a prompt's samples one after the other.

    Attributes:
        rows: the row of each completion.
        texts: texts, or lists of one message where prompts are messages.
        ids: their tokens, the end included.
    """

    rows: list[Row]
    texts: list[Any]
    ids: list[list[int]]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a reward, as TRL's trainers name them."""
        others = [name for name in self.rows[0] if name not in ("prompt", "completion", "completion_ids")]
        return {
            "prompts": [row["prompt"] for row in self.rows],
            "completions": self.texts,
            "completion_ids": self.ids,
            **{name: [row[name] for row in self.rows] for name in others},
        }


def room(config: Any, new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have beside so many new ones, by a model's configuration; None without a limit."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None else max(0, int(longest) - new_tokens)


def tokenise_prompts(tokenizer: Any, rows: Sequence[Row], longest: int | None) -> list[list[int]]:
    """Return the tokens of each prompt; messages go through the tokenizer's chat template.

    Args:
        tokenizer: of the model.
        rows: with prompts.
        longest: most tokens that leave room to write (`room`).

    Raises:
        ConfigError: messages without a template, or a prompt that is empty or too long.
    """
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], str):
        ids = tokenizer(prompts)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise ConfigError("The prompts are messages, but the model's tokenizer has no chat template: give texts.")
        ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = ids["input_ids"]
    for number, one in enumerate(cast(list[list[int]], ids), 1):
        if not one:
            raise ConfigError(f"Prompt number {number}, {prompts[number - 1]!r}, has no tokens: remove it.")
        if longest is not None and len(one) > longest:
            raise ConfigError(
                f"Prompt number {number} has {len(one)} tokens, and the model has room for {longest} beside its completion: "
                f"shorten the prompts or lower protocol.args.max_completion_length."
            )
    return ids


@torch.inference_mode()
def complete(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    samples: int,
    seed: int,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    **options: Any,
) -> Completions:
    """Draw completions from a Hugging Face causal model in evaluation mode.

    Every batch has a seed of its own, so that the same weights write the same texts in any process, and near ones like
    texts. The random state of the caller stays as it was.

    Args:
        model: on its device.
        tokenizer: with a padding token.
        rows: prompts.
        samples: completions of each.
        seed: of the draws.
        batch_size: prompts at once; other sizes give other draws.
        max_new_tokens: longest completion.
        temperature: of the softmax.
        options: further fields of transformers' `GenerationConfig`, such as top_p.

    Raises:
        ConfigError: numbers that make no sense, or a prompt that is too long.
    """
    from transformers import GenerationConfig

    if samples < 1 or batch_size < 1 or max_new_tokens < 1 or temperature <= 0:
        raise ConfigError("protocol.generation needs samples, batch_size, max_new_tokens and temperature above 0.")
    causal: Any = model.eval()
    device = next(model.parameters()).device
    ids = tokenise_prompts(tokenizer, rows, room(causal.config, max_new_tokens))
    ends = causal.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None:
        ends = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    config = GenerationConfig(
        **{
            "do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends or None, "max_new_tokens": max_new_tokens,
            "temperature": temperature, "num_return_sequences": samples, "disable_compile": True, **options,
        }
    )  # fmt: skip
    written: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, start in enumerate(range(0, len(rows), batch_size)):
            batch = ids[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": batch}, padding=True, padding_side="left", return_tensors="pt")
            torch.manual_seed(derive_seed(seed, "completions", number))
            found = causal.generate(**{name: inputs[name].to(device) for name in ("input_ids", "attention_mask")},
                                    generation_config=config)  # fmt: skip
            for tokens in found[:, inputs["input_ids"].shape[1] :].tolist():
                end = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
                written.append(tokens[:end])
    texts: list[Any] = tokenizer.batch_decode(written, skip_special_tokens=True)
    if not isinstance(rows[0]["prompt"], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return Completions([row for row in rows for _ in range(samples)], texts, written)
