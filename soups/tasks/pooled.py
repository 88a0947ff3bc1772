"""Several classification tasks as one: the multitask reference of protocols that share a body and not the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soups.errors import DataError
from soups.tasks.data import Samples, Splits
from soups.tasks.texts import Texts


def pooled(tasks: Sequence[Splits]) -> tuple[Splits, list[int]]:
    """Return the tasks' splits one after the other under one head, and how many classes each has.

    Labels are numbered over all tasks: task i's begin where those of task i − 1 end. OOD splits are left out.

    Raises:
        DataError: a task is not of texts.
    """
    groups = [len(task.classes) for task in tasks]
    first = [sum(groups[:number]) for number in range(len(groups))]

    def join(parts: Sequence[Samples]) -> Texts:
        texts: list[str] = []
        labels: list[torch.Tensor] = []
        for offset, part in zip(first, parts, strict=True):
            if not isinstance(part, Texts):
                raise DataError(
                    f"Only tasks of texts can be pooled; one is {type(part).__name__}. Set protocol.multitask=false."
                )
            texts += part.texts
            labels.append(part.labels + offset)
        return Texts(texts, torch.cat(labels))

    classes = tuple(f"{number}: {name}" for number, task in enumerate(tasks) for name in task.classes)
    train, heldout, test = (join([getattr(task, name) for task in tasks]) for name in ("train", "heldout", "test"))
    return Splits(train, heldout.by_length(), test.by_length(), classes), groups
