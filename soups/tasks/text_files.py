"""Anyone's texts: CSV, TSV or JSON Lines files with a column of texts and one of labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from soups.errors import DataError, did_you_mean
from soups.seeding import generator
from soups.tasks.data import Samples, Splits
from soups.tasks.texts import Texts

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def text_files(
    train: str,
    heldout: str | float = 0.2,
    test: str | float = 0.2,
    ood: Mapping[str, str] | None = None,
    text: str = "text",
    label: str = "label",
    split_seed: int = 0,
) -> Splits:
    """Return the texts of some files as a task. The classes are the labels of the training file, sorted.

    Args:
        train: a `.csv`, `.tsv` or `.jsonl` file; CSV and TSV files name their columns in the first line.
        heldout, test: files, or shares of each class to draw from the training file; texts that stand there twice count
            once.
        ood: files of the out-of-distribution splits, by name.
        text, label: names of the columns.
        split_seed: of the draw.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    rows = list(read_rows(Path(train).expanduser(), text, label))
    classes = tuple(sorted({row[1] for row in rows}))
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class(es) in its column {label!r}; at least two are needed.")

    def given(path: str) -> Texts:
        found: list[tuple[str, int]] = []
        for words, name, line in read_rows(Path(path).expanduser(), text, label):
            if name not in classes:
                raise DataError(
                    f"{path}, line {line}: the label {name!r} is not among those of {train}: "
                    f"{did_you_mean(name, classes)}"
                )
            found.append((words, classes.index(name)))
        return Texts([words for words, _ in found], [number for _, number in found]).by_length()

    parts: dict[str, Texts] = {}
    shares = {name: share for name, share in (("heldout", heldout), ("test", test)) if not isinstance(share, str)}
    if shares:
        rows = list({row[0]: row for row in reversed(rows)}.values())[::-1]
    rest = Texts([row[0] for row in rows], [classes.index(row[1]) for row in rows])
    for number, name in enumerate(shares):
        # The second share is of what the first draw has left.
        share = shares[name] / (1 - shares["heldout"]) if number == 1 else shares[name]
        parts[name], rest = _draw(rest, share, classes, split_seed, name)
    for name, path in (("heldout", heldout), ("test", test)):
        if isinstance(path, str):
            parts[name] = given(path)
    others: dict[str, Samples] = {name: given(path) for name, path in (ood or {}).items()}
    return Splits(rest, parts["heldout"], parts["test"], classes, others)


def read_rows(path: Path, text: str, label: str) -> Iterator[tuple[str, str, int]]:
    """Yield text, label and line number of each row of a file.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    for values, line in read_columns(path, (text, label)):
        if not isinstance(values[0], str) or not values[0].strip():
            raise DataError(f"{path}, line {line}: the text is {values[0]!r}; it must be some words.")
        if not str(values[1]).strip():
            raise DataError(f"{path}, line {line}: the label is empty.")
        yield values[0].strip(), str(values[1]).strip(), line


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[tuple[list[Any], int]]:
    """Yield the values of some columns and the line number of each row of a `.csv`, `.tsv` or `.jsonl` file.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    for row, line in read_whole_rows(path, columns):
        yield [row[column] for column in columns], line


def read_whole_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row of a `.csv`, `.tsv` or `.jsonl` file, which must have some columns, and its line number.

    Raises:
        DataError: naming the file, the line, and what is wrong.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix not in (*SEPARATORS, ".jsonl"):
        raise DataError(f"{path} is no .csv, .tsv or .jsonl file.")
    for row, line in _rows(path):
        for column in columns:
            if row.get(column) is None:
                there = [str(name) for name in row if name is not None]
                raise DataError(f"{path}, line {line}: there is no {column!r}: {did_you_mean(column, there)}")
        yield row, line


def _rows(path: Path) -> Iterator[tuple[dict[Any, Any], int]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row: Any = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}, line {number}: this is no JSON ({error}): {line[:60]!r}") from error
                    if not isinstance(row, dict):
                        raise DataError(f"{path}, line {number}: a JSON object is needed, not {line[:60]!r}")
                    yield row, number
                return
            reader = csv.DictReader(file, delimiter=SEPARATORS[path.suffix], strict=True)
            if not reader.fieldnames:
                raise DataError(f"{path} is empty.")
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise DataError(f"{path}, line {reader.line_num + 1}: {error}.") from error
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the {len(reader.fieldnames)} columns of the "
                        f"first line; quote fields that hold the separator."
                    )
                yield row, reader.line_num
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1 if error.start else 1
        raise DataError(f"{path}, near line {line}: this is not UTF-8 ({error.reason}). Convert the file.") from error


def _draw(texts: Texts, share: float, classes: tuple[str, ...], seed: int, name: str) -> tuple[Texts, Texts]:
    """Split off a share of each class; at least one text a class must remain on both sides."""
    if not 0 < share < 1:
        raise DataError(f"data.{name} must be a file, or a share between 0 and 1 (with data.heldout + data.test < 1).")
    drawn: list[int] = []
    for number, title in enumerate(classes):
        indices = (texts.labels == number).nonzero().flatten()
        order = indices[torch.randperm(len(indices), generator=generator(seed, name, number))].tolist()
        count = max(1, round(share * len(order)))
        if count >= len(order):
            raise DataError(f"The class {title!r} has {len(order)} text(s): too few to draw a {name} split from it.")
        drawn += order[:count]
    kept = sorted(set(range(len(texts))) - set(drawn))
    return texts.take(drawn).by_length(), texts.take(kept)
