"""Labelled texts, and how they become the token ids of a model's input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from soups.errors import ConfigError, DataError
from soups.seeding import generator
from soups.stores.files import fingerprint, replacing_folder
from soups.stores.safetensors import read_safetensors
from soups.stores.writer import write_safetensors
from soups.tasks.data import Batch, Input, Keys, Samples
from soups.tasks.wheels import cache_folder


class Texts(Samples):
    """Texts in memory.

    Args:
        texts: N of them.
        labels: int64 (N,), or numbers.
    """

    augmented: ClassVar[bool] = False

    def __init__(self, texts: Sequence[str], labels: Tensor | Sequence[int]) -> None:
        self.texts = list(texts)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if len(self.texts) != len(self.labels):
            raise DataError(f"{len(self.texts)} texts came with {len(self.labels)} labels; each needs exactly one.")

    def digest(self) -> str:
        """Hash texts and labels."""
        return fingerprint([hash_texts(self.texts), self.labels.tolist()])

    def identities(self) -> list[str]:
        """Return the texts without regard to case and spacing."""
        return [" ".join(text.split()).casefold() for text in self.texts]

    def take(self, indices: Tensor | Sequence[int]) -> Texts:
        """Return the texts at `indices`, (M,)."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Texts([self.texts[index] for index in chosen.tolist()], self.labels[chosen])

    def by_length(self) -> Texts:
        """Return the same texts from short to long: batches of like lengths pad little, so evaluation is faster."""
        return self.take(sorted(range(len(self)), key=lambda index: (len(self.texts[index]), index)))


def hash_texts(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


class Tokens(Dataset[Batch]):
    """Tokenised texts as model input. Indexed by a list of (epoch, index), so that one call makes one batch.

    A batch is padded on the right to its longest text. Which texts make a batch is the sampler's to say, so what a text
    is padded to depends on neither loader workers nor, in evaluation, the number of processes.

    Args:
        ids: token ids of each text, int64, of any lengths.
        labels: (N,).
        padding: the id to pad with; the attention mask hides it.
    """

    def __init__(self, ids: Sequence[Tensor], labels: Tensor, padding: int) -> None:
        self.ids, self.labels, self.padding = list(ids), labels, padding

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, keys: Keys) -> Batch:
        """Return `input_ids` and `attention_mask`, int64 (B, longest), and labels (B,)."""
        indices = [index for _, index in keys]
        return pad([self.ids[index] for index in indices], self.padding), self.labels[indices]


def pad(ids: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """Return token ids of B texts as `input_ids` and `attention_mask`, int64 (B, longest), padded on the right."""
    inputs = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(one) for one in ids])
    return {"input_ids": inputs, "attention_mask": (torch.arange(inputs.shape[1]) < lengths[:, None]).long()}


class TextInput(Input):
    """Token ids and attention mask, by a Hugging Face tokenizer.

    Args:
        tokenizer: with a padding token.
        announce: called with the token ids of texts before any of them is read.
    """

    def __init__(self, tokenizer: Any, announce: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        self.tokenizer, self._announce = tokenizer, announce
        self._kept: dict[str, list[Tensor]] = {}

    def dataset(
        self, samples: Samples, size: int, augment: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Dataset[Batch]:
        """Return texts of at most `size` tokens; longer ones lose their end. Texts are not augmented."""
        del augment, seed
        if not isinstance(samples, Texts):
            raise ConfigError(
                f"This model reads texts, but the data are {type(samples).__name__}: choose another model=… or data=…"
            )
        return Tokens(self.tokenise(samples.texts, size), samples.labels, int(self.tokenizer.pad_token_id))

    def tokenise(self, texts: Sequence[str], size: int) -> list[Tensor]:
        """Return the token ids of each text, int64, at most `size` of them; kept in memory and in the cache folder.

        Raises:
            DataError: a text has no token.
        """
        name = fingerprint([hash_texts(texts), self._identity(), size])
        if name not in self._kept:
            self._kept[name] = self._stored(texts, size, cache_folder() / "tokens" / name)
            if self._announce is not None:
                self._announce(self._kept[name])
        return self._kept[name]

    def _stored(self, texts: Sequence[str], size: int, folder: Path) -> list[Tensor]:
        path = folder / "tokens.safetensors"
        if not path.is_file():
            ids = cast(list[list[int]], self.tokenizer(list(texts), truncation=True, max_length=size)["input_ids"])
            if empty := [number for number, one in enumerate(ids) if not one]:
                raise DataError(f"Text number {empty[0]} has no tokens: {texts[empty[0]]!r}. Remove it.")
            flat = torch.tensor([token for one in ids for token in one], dtype=torch.int32)
            with replacing_folder(folder) as scratch:
                write_safetensors(
                    scratch / path.name, {"ids": flat, "lengths": torch.tensor([len(one) for one in ids])}
                )
        found = read_safetensors(path)
        return list(found["ids"].long().split(found["lengths"].tolist()))

    def _identity(self) -> str:
        """Return a hash of what decides the token ids: vocabulary, normalisation and special tokens."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:
            content: Any = json.loads(fast.to_str())
            content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        else:
            content = self.tokenizer.get_vocab()
        return fingerprint([type(self.tokenizer).__name__, content, self.tokenizer.pad_token_id])


def draw(total: int, sizes: Sequence[int], seed: int, groups: Sequence[str] | None = None) -> list[list[int]]:
    """Draw splits without overlap, at random.

    Args:
        total: samples to draw from.
        sizes: of the splits.
        seed: of the draw.
        groups: of each sample (a review, an article): a group stays on one side of every split.

    Returns:
        For each split the indices of its samples, in drawn order.

    Raises:
        DataError: there are too few samples.
    """
    order: list[int] = torch.randperm(total, generator=generator(seed, "split")).tolist()
    if groups is not None:
        members: dict[str, list[int]] = {}
        for index in order:
            members.setdefault(groups[index], []).append(index)
        order = [index for group in members.values() for index in group]
    splits: list[list[int]] = []
    place = 0
    for size in sizes:
        taken = order[place : place + size]
        if len(taken) < size or size < 1:
            raise DataError(
                f"The splits ask for {' + '.join(map(str, sizes))} texts, each at least one, but there are only {total} "
                f"(a group of texts stays on one side, which costs some more): lower data.train, data.heldout or data.test."
            )
        splits.append(taken)
        place += size
        while groups is not None and place < total and groups[order[place]] == groups[order[place - 1]]:
            place += 1  # the rest of a group that was cut is left out
    return splits
