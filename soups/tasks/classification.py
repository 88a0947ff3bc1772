"""Fine-tuning a classifier under Lightning: the loss, the optimiser and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from soups.evaluation import Batch, Inputs, forward
from soups.tasks.network import Network
from soups.tasks.optimisation import optimizer_and_schedule


class Classification(lightning.LightningModule):
    """A network fine-tuned with cross-entropy, AdamW or SGD, warm-up and cosine decay.

    Args:
        network: the classifier.
        num_classes: classes.
        optimizer: as `soups.tasks.optimisation.optimizer_and_schedule` takes it.
        label_smoothing: in [0, 1).
        freeze_batchnorm: keep the running statistics of the pretrained model and normalise with them.
        class_groups: for tasks pooled under one head, how many classes each has; a sample's loss is over its own task's
            classes alone. Empty: one task.
        channels_last: give the network its images in this memory format; faster for convolutions on most CPUs and GPUs.
    """

    def __init__(
        self,
        network: Network,
        num_classes: int,
        optimizer: Mapping[str, Any],
        label_smoothing: float = 0.0,
        freeze_batchnorm: bool = True,
        channels_last: bool = True,
        class_groups: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = network.module
        self.settings = dict(optimizer)
        self.label_smoothing = label_smoothing
        self.freeze_batchnorm = freeze_batchnorm
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.class_groups = tuple(class_groups)
        self._validated: list[Tensor] = []
        self._validated_after = -1
        self.train_loss = MeanMetric()
        self.heldout_loss = MeanMetric()
        self.heldout_accuracy = MulticlassAccuracy(num_classes, average="micro")
        # Lightning keeps the modes it finds, so the frozen layers must be in theirs before the fit.
        self.train()

    def forward(self, inputs: Inputs) -> Tensor:
        """Return logits (B, classes) for images (B, 3, H, W), or for the named tensors of texts (B, tokens)."""
        if isinstance(inputs, Tensor):
            inputs = inputs.contiguous(memory_format=self.memory_format)
        return forward(self.model, inputs)

    def train(self, mode: bool = True) -> Classification:
        """Set training mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if mode and self.freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                    module.eval()
        return self

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, labels = batch
        logits = within_groups(self(inputs), labels, self.class_groups)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach(), weight=len(labels))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the predictions of an earlier validation."""
        self._validated, self._validated_after = [], self.trainer.global_step

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score a batch of the held-out split."""
        inputs, labels = batch
        answers = self(inputs)
        self._validated.append(answers.detach().float().cpu())
        logits = within_groups(answers, labels, self.class_groups)
        self.heldout_loss.update(functional.cross_entropy(logits, labels), weight=len(labels))
        self.heldout_accuracy.update(logits, labels)
        self.log("heldout/loss", self.heldout_loss, batch_size=len(labels))
        self.log("heldout/accuracy", self.heldout_accuracy, batch_size=len(labels))

    def validated_logits(self, count: int) -> Tensor | None:
        """Return the held-out logits, float32 (N, classes), of a validation of all samples at the end of the fit, or None.

        Args:
            count: N, of the whole held-out split.
        """
        trainer = self.trainer
        if trainer.world_size > 1 or self._validated_after != trainer.global_step or not self._validated:
            return None
        logits = torch.cat(self._validated)
        return logits if len(logits) == count else None

    def configure_optimizers(self) -> Any:
        """Build the optimiser over what is trainable, and its schedule by step."""
        return optimizer_and_schedule(self.parameters(), self.settings, self.trainer.estimated_stepping_batches)


def within_groups(logits: Tensor, labels: Tensor, groups: Sequence[int]) -> Tensor:
    """Return logits (B, classes) with the classes of other tasks than the label's out of the running.

    Args:
        logits: (B, classes).
        labels: (B,), numbered over all tasks.
        groups: how many classes each task has, in the order of the logits; empty leaves the logits as they are.

    >>> within_groups(torch.zeros(2, 3), torch.tensor([0, 2]), [2, 1]).exp()
    tensor([[1., 1., 0.],
            [0., 0., 1.]])
    """
    if not groups:
        return logits
    task = torch.repeat_interleave(torch.tensor(groups, device=labels.device))
    return logits.masked_fill(task[labels][:, None] != task[None, :], float("-inf"))
