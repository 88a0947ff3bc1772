"""Pooled tasks: labels numbered over all tasks, and a loss over each sample's own task alone."""

import pytest
import torch
from torch.nn import functional

from soups.errors import DataError
from soups.tasks.classification import within_groups
from soups.tasks.data import Splits
from soups.tasks.images import TensorImages
from soups.tasks.pooled import pooled
from soups.tasks.texts import Texts


def task(prefix: str, classes: int) -> Splits:
    texts = Texts([f"{prefix} {'x' * n}" for n in range(6)], [n % classes for n in range(6)])
    return Splits(texts, texts.take([0, 1]), texts.take([2]), tuple(map(str, range(classes))))


def test_labels_of_the_second_task_follow_those_of_the_first() -> None:
    joint, groups = pooled([task("a", 2), task("b", 3)])
    assert groups == [2, 3] and len(joint.classes) == 5
    assert joint.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    assert len(joint.heldout) == 4 and len(joint.test) == 2
    images = TensorImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="Only tasks of texts"):
        pooled([Splits(images, images, images, ("0", "1"))])


def test_the_pooled_loss_is_that_of_separate_heads() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 1, 2, 3, 4])
    together = functional.cross_entropy(within_groups(logits, labels, [2, 3]), labels)
    apart = functional.cross_entropy(logits[:3, :2], labels[:3], reduction="sum")
    apart = (apart + functional.cross_entropy(logits[3:, 2:], labels[3:] - 2, reduction="sum")) / 6
    torch.testing.assert_close(together, apart)
    (gradient,) = torch.autograd.grad(together, logits)
    assert torch.equal(gradient[:3, 2:], torch.zeros(3, 3)) and torch.isfinite(gradient).all()
