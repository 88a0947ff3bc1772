"""Losses over several tasks: their sum over the tasks of a suite, with its gradient by the mixed weights.

| name | loss of a task | needs |
|---|---|---|
| `entropy` | mean entropy of the predictions (AdaMerging) | inputs |
| `cross_entropy` | mean cross-entropy with the labels | labels |
| `agreement` | cross-entropy with the class that the task's expert predicts, over the samples that pass a filter | inputs, experts |
| `kl` | KL(expert ‖ mixture) of tempered predictions, times the temperature squared (distillation, arXiv:1503.02531) | inputs, experts |

Entropy can fall while accuracy falls; `agreement` is the default for that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from soups.coefficients.objectives import LossGradient
from soups.errors import ConfigError, did_you_mean
from soups.evaluation import Inputs
from soups.seeding import generator
from soups.weights import Weights

TaskLoss = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""From logits (B, classes), labels (B,) and the expert's logits (B, classes) to a loss."""


class Suite(Protocol):
    """What is needed of a task suite; `soups.suites.TaskSuite` is one."""

    @property
    def tasks(self) -> Sequence[str]:
        """The names of the tasks."""
        ...

    @property
    def experts(self) -> Mapping[str, Weights]:
        """Each expert's weights without head."""
        ...

    @property
    def heads(self) -> Mapping[str, Weights]:
        """Each task's head."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights and inputs go."""
        ...

    def batches(self, task: str, split: str) -> Sequence[tuple[Inputs, Tensor]]:
        """Return a split in batches of inputs and labels, in a fixed order."""
        ...

    def forward(self, weights: Weights, task: str, inputs: Inputs, head: Weights | None = None) -> Tensor:
        """Return logits (B, classes), differentiable in the weights and the head."""
        ...

    def predict(self, weights: Weights, task: str, split: str, head: Weights | None = None) -> Tensor:
        """Return logits (N, classes) on a split, in the order of its batches."""
        ...

    def evaluate(
        self,
        weights: Weights,
        split: str = "heldout",
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, Weights] | None = None,
    ) -> Mapping[str, Any]:
        """Return scores, with `accuracy`, by task."""
        ...


def entropy(logits: Tensor, labels: Tensor | None, expert: Tensor | None) -> Tensor:
    """Return the mean entropy of the predictions, in nats (AdaMerging, arXiv:2310.02575)."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def cross_entropy(logits: Tensor, labels: Tensor | None, expert: Tensor | None) -> Tensor:
    """Return the mean cross-entropy with the labels, in nats."""
    assert labels is not None
    return functional.cross_entropy(logits, labels)


def agreement(logits: Tensor, labels: Tensor | None, expert: Tensor | None) -> Tensor:
    """Return the cross-entropy with the expert's classes, averaged over the samples that pass SyMerge's filter.

    A sample passes if the mixture predicts the expert's class, or if the expert is at least as confident in its class as the
    mixture in its own. The loss is 0 where none passes.
    """
    assert expert is not None
    sure, target = expert.softmax(-1).max(-1)
    own, predicted = logits.detach().softmax(-1).max(-1)
    kept = (predicted == target) | (sure >= own)
    losses = functional.cross_entropy(logits, target, reduction="none")
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def kl(logits: Tensor, labels: Tensor | None, expert: Tensor | None, temperature: float = 2.0) -> Tensor:
    """Return the mean KL divergence from the expert's to the mixture's tempered predictions, times the temperature squared."""
    assert expert is not None
    ours, theirs = ((one / temperature).log_softmax(-1) for one in (logits, expert))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


TASK_LOSSES: dict[str, TaskLoss] = {
    "entropy": entropy,
    "cross_entropy": cross_entropy,
    "agreement": agreement,
    "kl": kl,
}
NEEDS_EXPERTS = ("agreement", "kl")


def find_task_loss(name: str) -> TaskLoss:
    """Return a task's loss by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASK_LOSSES:
        raise ConfigError(f"There is no objective {name!r}: {did_you_mean(name, [*TASK_LOSSES, 'accuracy'])}")
    return TASK_LOSSES[name]


class SuiteObjective:
    """The sum of a loss over the tasks of a suite, on small batches of a split.

    Step number n has batches of its own, the same in every run: the split's samples are shuffled anew in each pass over them.

    Args:
        suite: the tasks, with heads and experts.
        loss: from `TASK_LOSSES`, or a function of one's own.
        moving: the tensors that a gradient is wanted of.
        split: whose samples are used.
        batch_size: samples of a task in a step, at most: samples that the suite batches together stay together.
        repeats: batches of each task in a step, whose losses are added up (AdaMerging's code has two).
        one_task: a step has one task, in an order that is shuffled for each round (SyMerge's code).
        fit_heads: fit the tasks' heads too.
        experts: compare with the experts' predictions.
        seed: of the order of samples and tasks.
    """

    batches = 1

    def __init__(
        self,
        suite: Suite,
        loss: TaskLoss,
        moving: Collection[str],
        *,
        split: str = "adaptation",
        batch_size: int = 16,
        repeats: int = 1,
        one_task: bool = False,
        fit_heads: bool = False,
        experts: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or repeats < 1:
            raise ConfigError(f"batch_size={batch_size} and repeats={repeats} must be at least 1.")
        self.suite, self.loss, self.moving, self.split = suite, loss, set(moving), split
        self.batch_size, self.repeats, self.one_task, self.seed = batch_size, repeats, one_task, seed
        self._heads: dict[str, dict[str, Tensor]] = {}
        if fit_heads:
            self._heads = {
                task: {
                    name: tensor.detach().to(suite.device, copy=True).requires_grad_()
                    for name, tensor in suite.heads[task].items()
                }
                for task in suite.tasks
            }
        self._experts: dict[str, list[Tensor]] = {}
        if experts:
            for task in suite.tasks:
                logits = suite.predict(suite.experts[task], task, split)
                self._experts[task] = list(logits.split([len(labels) for _, labels in suite.batches(task, split)]))
        # Where the small batches of a task begin and end: (batch of the suite, first, last).
        self._pieces = {task: self._cut(task) for task in suite.tasks}

    def _cut(self, task: str) -> list[tuple[int, int, int]]:
        pieces: list[tuple[int, int, int]] = []
        for number, (_, labels) in enumerate(self.suite.batches(task, self.split)):
            for first in range(0, len(labels), self.batch_size):
                pieces.append((number, first, min(first + self.batch_size, len(labels))))
        if not pieces:
            raise ConfigError(f"The task {task} has no samples in its split {self.split!r}.")
        return pieces

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The heads, if they are fitted."""
        return {f"{task}/{name}": one for task, head in self._heads.items() for name, one in head.items()}

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Return the fitted heads by task, on the CPU; empty where they are not fitted."""
        return {
            task: {name: one.detach().cpu().clone() for name, one in head.items()} for task, head in self._heads.items()
        }

    def gradient(self, weights: Weights, batch: int) -> LossGradient:
        """Return the loss of some weights in step number `batch`, and its derivatives."""
        by_tensor: dict[int, Tensor] = {}  # tied names share one leaf, whose gradient is the sum over their uses
        leaves: dict[str, Tensor] = {}
        wanted: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            leaf = by_tensor.get(id(tensor))
            if leaf is None:
                leaf = tensor.detach().to(self.suite.device).requires_grad_(name in self.moving)
                by_tensor[id(tensor)] = leaf
                if leaf.requires_grad:
                    wanted[name] = leaf
            leaves[name] = leaf
        heads = self.parameters
        total = 0.0
        sums = {name: torch.zeros_like(one) for name, one in [*wanted.items(), *heads.items()]}
        for task, inputs, labels, expert in self._samples(batch):
            logits = self.suite.forward(leaves, task, inputs, self._heads.get(task))
            value = self.loss(logits, labels, expert)
            if not value.requires_grad:
                continue
            targets = [*wanted.values(), *heads.values()]
            slopes = torch.autograd.grad(value, targets, allow_unused=True, materialize_grads=True)
            for name, slope in zip(sums, slopes, strict=True):
                sums[name] += slope
            total += float(value.detach())
        return LossGradient(total, {name: sums[name] for name in wanted}, {name: sums[name] for name in heads})

    def _samples(self, step: int) -> list[tuple[str, Inputs, Tensor, Tensor | None]]:
        tasks = list(self.suite.tasks)
        if self.one_task:
            order = torch.randperm(len(tasks), generator=generator(self.seed, "tasks", step // len(tasks)))
            tasks, first = [tasks[int(order[step % len(tasks)])]], step // len(tasks) * self.repeats
        else:
            first = step * self.repeats
        return [self._small_batch(task, first + number) for task in tasks for number in range(self.repeats)]

    def _small_batch(self, task: str, number: int) -> tuple[str, Inputs, Tensor, Tensor | None]:
        pieces, device = self._pieces[task], self.suite.device
        epoch, position = divmod(number, len(pieces))
        place = int(torch.randperm(len(pieces), generator=generator(self.seed, "batches", task, epoch))[position])
        batch, first, last = pieces[place]
        inputs, labels = self.suite.batches(task, self.split)[batch]
        rows = torch.randperm(len(labels), generator=generator(self.seed, "samples", task, epoch, batch))[first:last]
        chosen = _rows(inputs, rows, device)
        expert = self._experts[task][batch][rows].to(device) if task in self._experts else None
        return task, chosen, labels[rows].to(device), expert

    def value(self, weights: Weights) -> float:
        """Return the loss of some weights over the whole split, summed over the tasks; for optimisers without gradients."""
        total = 0.0
        for task in self.suite.tasks:
            logits = self.suite.predict(weights, task, self.split, self._heads.get(task))
            labels = torch.cat([labels for _, labels in self.suite.batches(task, self.split)])
            expert = torch.cat(self._experts[task]) if task in self._experts else None
            total += float(self.loss(logits, labels.to(logits.device), expert))
        return total


def _rows(inputs: Inputs, rows: Tensor, device: torch.device) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[rows].to(device)
    return {name: value[rows].to(device) for name, value in inputs.items()}
