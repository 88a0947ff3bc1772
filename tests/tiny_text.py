"""A text model of a few thousand weights with a tokenizer, and sentences whose class a word gives away; all made here."""

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
OTHER = ("the", "film", "was", "and", "plot", "of", "it", "actor", "scene", "very", "so", "a", "music", "end")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_bert(folder: Path, layers: int = 1, dropout: float = 0.1, labels: int = 2) -> Path:
    """Write a BERT classifier of random weights, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(GOOD + BAD + OTHER), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
        num_labels=labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_gpt2(folder: Path, layers: int = 1) -> Path:
    """Write a decoder classifier of random weights, and the same tokenizer."""
    torch.manual_seed(0)
    tokenizer(folder)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(GOOD + BAD + OTHER), n_embd=16, n_layer=layers, n_head=2, n_positions=32, num_labels=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_writer(folder: Path) -> Path:
    """Write a causal decoder of random weights, and the same tokenizer without marks around a text."""
    torch.manual_seed(0)
    tokenizer(folder, marks=False)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(GOOD + BAD + OTHER), n_embd=16, n_layer=1, n_head=2, n_positions=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tokenizer(folder: Path, marks: bool = True) -> PreTrainedTokenizerFast:
    """Write a tokenizer of whole words; with `marks` it puts [CLS] before and [SEP] after a text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + GOOD + BAD + OTHER)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        **({} if marks else {"bos_token": "[CLS]", "eos_token": "[SEP]"}),
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label): three to nine words, one of them good or bad."""
    draw = torch.Generator().manual_seed(seed)

    def one(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    rows = []
    for number in range(count):
        label = ("neg", "pos")[number % 2]
        words = [one(OTHER) for _ in range(2 + int(torch.randint(7, (), generator=draw)))]
        place = int(torch.randint(len(words), (), generator=draw))
        words.insert(place, one(GOOD if label == "pos" else BAD))
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write rows with the header text,label."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path
