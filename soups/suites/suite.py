"""A task suite: several tasks over one backbone, evaluated together.

    suite = open_suite("texts")             # conf/suite/texts.yaml, or a file of your own
    suite.prepare()                         # base model, probes and experts: made once, then read
    suite.tasks                             # ("computers", "hobbies", …)
    merged = merge("ties", [suite.expert_path(task) for task in suite.tasks], base=suite.base_path)
    suite.evaluate(merged)                  # {"computers": Score(accuracy=…, loss=…, count=…), …} on held-out data
    suite.batches("hobbies", "adaptation", labelled=False)
    suite.forward(weights, "hobbies", inputs)   # differentiable in the weights

A **backbone**'s weights are a network's without its head, under the library's names. Every task has a head: the linear probe
of the base model, which the expert was trained under (with `train_head` the expert's own). A merged backbone is judged with
the tasks' heads, so the task of an input must be known.

Everything that is computed lies below `folder`, named by what decides it: experts of one base model, data and fit are made
once for all suites and studies. What is stored is read back, also after an interruption: the unit that is redone is one fit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from soups.errors import ConfigError, did_you_mean
from soups.evaluation import Batch, Inputs, Score, candidates_of, predict, score
from soups.fitting.spec import TRAINING_VERSION
from soups.fitting.task import build_network
from soups.seeding import derive_seed
from soups.stores import write_safetensors
from soups.stores.files import fingerprint, replacing_folder, write_json
from soups.stores.safetensors import read_safetensors
from soups.suites.fits import fit, steps_of
from soups.suites.progress import SuiteProgress
from soups.suites.specification import SuiteSpec, read_suite
from soups.suites.splits import SuiteSplits, build_splits
from soups.tasks.data import OrderedBatches
from soups.tasks.network import Network
from soups.tasks.probe import linear_probe
from soups.tasks.wheels import cache_folder
from soups.weights import Weights, check_same, hash_weights

_BASE, _HEAD, _EXPERT = "base.safetensors", "head.safetensors", "expert.safetensors"


def open_suite(source: str | Path, **options: Any) -> TaskSuite:
    """Return a suite of `conf/suite` by its name, or that of a YAML file; see `TaskSuite` for options.

    Raises:
        ConfigError: there is none, or its settings are not allowed.
    """
    return TaskSuite(read_suite(source), **options)


class TaskSuite:
    """Tasks over one backbone, with experts.

    Args:
        spec: the suite.
        folder: where base model, heads and experts are kept; None takes `suites` in the cache folder.
        device: for fits and predictions; None takes a GPU where there is one.
        show_progress: draw bars on standard error.

    Attributes:
        tasks: their names.
        heads: the weights of each task's head, by task.
        experts: the weights of each task's expert without head, by task; read at each access, so that no more of them are in
            memory than a caller holds.
    """

    def __init__(
        self,
        spec: SuiteSpec,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = True,
    ) -> None:
        self.spec = spec
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder() / "suites"
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tasks = tuple(spec.tasks)
        self.heads: Mapping[str, dict[str, Tensor]] = _ByTask(self.tasks, self._head)
        self.experts: Mapping[str, dict[str, Tensor]] = _ByTask(
            self.tasks, lambda task: read_safetensors(self.expert_path(task))
        )
        self._progress = SuiteProgress(show_progress)
        self._splits: dict[str, SuiteSplits] = {}
        self._heads: dict[str, dict[str, Tensor]] = {}
        self._batches: dict[tuple[str, str], list[Batch]] = {}

    # Data

    def splits(self, task: str) -> SuiteSplits:
        """Return a task's data, built once.

        Raises:
            ConfigError: there is no such task.
            soups.errors.DataError: two of its splits share a sample, or the data cannot be had.
        """
        if task not in self.spec.tasks:
            raise ConfigError(f"The suite {self.spec.name} has no task {task!r}: {did_you_mean(task, self.tasks)}")
        if task not in self._splits:
            one = self.spec.tasks[task]
            adaptation = one.adaptation or self.spec.adaptation
            self._splits[task] = build_splits(one.data, task, adaptation, self.spec.seed)
        return self._splits[task]

    def classes(self, task: str) -> tuple[str, ...]:
        """Return a task's class names in the order of its logits."""
        return self.splits(task).classes

    def labels(self, task: str, split: str) -> Tensor:
        """Return the labels of a split, int64 (N,), in the order of its batches."""
        return self.splits(task).samples(split).labels

    @overload
    def batches(self, task: str, split: str, labelled: Literal[True] = True) -> Sequence[Batch]: ...
    @overload
    def batches(self, task: str, split: str, labelled: Literal[False]) -> Sequence[Inputs]: ...
    def batches(self, task: str, split: str, labelled: bool = True) -> Sequence[Batch] | Sequence[Inputs]:
        """Return a split as batches in a fixed order, not augmented, on the CPU.

        Args:
            task: its name.
            split: "train", "adaptation", "heldout" or "test".
            labelled: (inputs, labels) of each batch; false gives the inputs alone.
        """
        if (task, split) not in self._batches:
            samples, size = self.splits(task).samples(split), self.spec.fit(task).loader.size
            data = self._network.input.dataset(samples, size)
            order = OrderedBatches(len(samples), self.spec.eval_batch_size)
            self._batches[task, split] = [data[keys] for keys in order]
        found = self._batches[task, split]
        return found if labelled else [inputs for inputs, _ in found]

    # Weights

    @property
    def base_path(self) -> Path:
        """The file of the base model's weights without head; made if it is not there."""
        folder = self.folder / "bases" / fingerprint(self._base_determinants())
        if not (folder / _BASE).is_file():
            self._make_base(folder)
        return folder / _BASE

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The weights of the base model without head."""
        return read_safetensors(self.base_path)

    @cached_property
    def base_hash(self) -> str:
        """The hash of the base model's weights."""
        return hash_weights(self.base)

    def expert_path(self, task: str) -> Path:
        """Return the file of an expert's weights without head; made if it is not there."""
        folder = self.folder / "experts" / fingerprint(self._expert_determinants(task))
        if not (folder / _EXPERT).is_file():
            self._make_expert(task, folder)
        return folder / _EXPERT

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the suite's experts, heads and data."""
        return fingerprint({task: self._expert_determinants(task) for task in self.tasks})

    def prepare(self) -> None:
        """Make whatever is not there yet; a suite that was interrupted goes on where it stopped."""
        _ = self.base_path
        for task in self.tasks:
            self.expert_path(task)
            _ = self.heads[task]

    # Models

    def module(self, task: str, weights: Weights | None = None) -> nn.Module:
        """Return a network of one's own, with a task's head and some backbone's weights (the base model's by default)."""
        network = self._with_head(task, self.base if weights is None else weights)
        found = copy.deepcopy(network.module)
        for parameter in found.get_submodule(network.head).parameters():
            parameter.requires_grad_(True)
        return found

    def forward(self, weights: Weights, task: str, inputs: Inputs, head: Weights | None = None) -> Tensor:
        """Return logits (B, classes) of some backbone under a task's head, differentiable in both.

        The network is in evaluation mode. Tensors that are absent from `weights` are the base model's. Leave out, or pass
        without a gradient, what the model freezes: only then do cached outputs of frozen layers serve.

        Args:
            weights: of the backbone, on the suite's device.
            task: whose head to use.
            inputs: of a batch, on that device.
            head: weights in the place of the task's head.
        """
        module, candidates = self._network.module.eval(), candidates_of(inputs)
        values = {**self._base_on_device, **self._head_on_device(task), **weights, **(head or {})}
        if isinstance(inputs, Tensor):
            output = functional_call(module, values, (inputs,))
        else:
            named = {n: value if candidates is None else value.flatten(0, 1) for n, value in inputs.items()}
            output = functional_call(module, values, (), named)
        logits: Tensor = getattr(output, "logits", output)
        return logits if candidates is None else logits.reshape(-1, candidates)

    def predict(self, weights: Weights, task: str, split: str, head: Weights | None = None) -> Tensor:
        """Return logits, float32 (N, classes), of some backbone on a split, under the task's head or another one.

        Raises:
            soups.errors.WeightsError: the weights are not the backbone's.
        """
        check_same(self.base, weights, where=f"the weights to evaluate on {task}")
        module = self._with_head(task, weights, head).module
        return predict(module.to(self.device), list(self.batches(task, split)), self.device)

    def evaluate(
        self,
        weights: Weights,
        split: str = "heldout",
        tasks: Sequence[str] | None = None,
        heads: Mapping[str, Weights] | None = None,
    ) -> dict[str, Score]:
        """Return accuracy, loss and count of some backbone on every task, or on some tasks.

        Args:
            weights: of the backbone.
            split: "heldout" for choosing; "test" once, at the end.
            tasks: their names; None for all.
            heads: in the place of the suite's, by task.
        """
        return {
            task: score(self.predict(weights, task, split, (heads or {}).get(task)), self.labels(task, split))
            for task in tasks or self.tasks
        }

    # What is made once

    @cached_property
    def _network(self) -> Network:
        """The one network that all tasks share: weights and head are put into it when they are needed."""
        classes, seed = len(self.classes(self.tasks[0])), derive_seed(self.spec.seed, "base model")
        network = build_network(self.spec.model, classes, seed, self.spec.task.channels_last)
        network.module.to(self.device)
        return network

    @cached_property
    def _base_on_device(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.base.items()}

    def _head_on_device(self, task: str) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.heads[task].items()}

    def _with_head(self, task: str, weights: Weights, head: Weights | None = None) -> Network:
        network = self._with_width(len(self.classes(task)))
        network.module.load_state_dict({**weights, **(head or self.heads[task])})
        return network

    def _with_width(self, classes: int) -> Network:
        """Return the network with a head for so many classes."""
        network = self._network
        if network.linear().out_features != classes:
            old = network.linear()
            place, _, name = network.head.rpartition(".")
            new = nn.Linear(old.in_features, classes, bias=_has_bias(old)).to(self.device)
            setattr(network.module.get_submodule(place), name, new.requires_grad_(old.weight.requires_grad))
        return network

    def _backbone(self) -> dict[str, Tensor]:
        """Return a copy of the network's weights without head."""
        prefix = f"{self._network.head}."
        state = self._network.module.state_dict()
        return {name: _copied(tensor) for name, tensor in state.items() if not name.startswith(prefix)}

    def _current_head(self) -> dict[str, Tensor]:
        prefix = f"{self._network.head}."
        state = self._network.module.state_dict()
        return {name: _copied(tensor) for name, tensor in state.items() if name.startswith(prefix)}

    def _base_determinants(self) -> dict[str, Any]:
        trained = self.spec.pretraining
        seed = self.spec.seed if trained or not self.spec.model.get("pretrained", True) else None
        if trained is None:
            return {"version": TRAINING_VERSION, "model": self.spec.model, "seed": seed}
        return {
            "version": TRAINING_VERSION,
            "model": self.spec.model,
            "seed": seed,
            "pretraining": trained.plain(),
            "loader": self.spec.loader.plain(),
            "task": self.spec.task.plain(),
        }

    def _head_determinants(self, task: str) -> dict[str, Any]:
        return {
            "version": TRAINING_VERSION,
            "base": self.base_hash,
            "split": self.splits(task).hash(),
            "size": self.spec.fit(task).loader.size,
        }

    def _expert_determinants(self, task: str) -> dict[str, Any]:
        spec = self.spec.fit(task).on(split=self.splits(task).hash(), base_model=self.base_hash)
        return {**spec.determinants(), "train_head": self.spec.train_head}

    def _make_base(self, folder: Path) -> None:
        trained = self.spec.pretraining
        if trained is not None:
            splits = build_splits(trained.data, "pretraining", 1, self.spec.seed)
            spec = self.spec.fit(self.tasks[0]).with_(
                optimizer=trained.optimizer.plain(), trainer=trained.trainer.plain(), data=trained.data
            )
            spec = spec.model_copy(update={"augment": trained.augment})
            network = self._with_width(len(splits.classes))
            with self._progress.fit(self.spec.name, "base model", steps_of(spec, len(splits.train))) as advance:
                fit(network, splits.as_splits(), spec, self.device, advance)
        with replacing_folder(folder) as scratch:
            write_safetensors(scratch / _BASE, self._backbone())
            write_json(scratch / "record.json", self._base_determinants())

    def _head(self, task: str) -> dict[str, Tensor]:
        if task not in self._heads:
            if self.spec.train_head:
                self._heads[task] = read_safetensors(self.expert_path(task).parent / _HEAD)
            else:
                self._heads[task] = self._probe(task)
        return self._heads[task]

    def _probe(self, task: str) -> dict[str, Tensor]:
        """Return the linear probe of the base model on a task, made if it is not there."""
        folder = self.folder / "heads" / fingerprint(self._head_determinants(task))
        if not (folder / _HEAD).is_file():
            classes = self.classes(task)
            network = self._with_width(len(classes))
            network.module.load_state_dict(self.base, strict=False)
            with self._progress.note(self.spec.name, f"{task}: linear probe"):
                train, heldout = self.batches(task, "train"), self.batches(task, "heldout")
                probe = linear_probe(network, train, heldout, len(classes), self.device)
            self._batches.pop((task, "train"), None)
            with replacing_folder(folder) as scratch:
                write_safetensors(scratch / _HEAD, self._current_head())
                record = {"heldout_accuracy": probe.heldout_accuracy, "strength": probe.strength}
                write_json(scratch / "record.json", {**self._head_determinants(task), **record})
        return read_safetensors(folder / _HEAD)

    def _make_expert(self, task: str, folder: Path) -> None:
        began, spec, splits = time.perf_counter(), self.spec.fit(task), self.splits(task)
        network = self._with_width(len(splits.classes))
        network.module.load_state_dict({**self.base, **self._probe(task)})
        for parameter in network.linear().parameters():
            parameter.requires_grad_(self.spec.train_head)
        with self._progress.fit(self.spec.name, f"{task}: expert", steps_of(spec, len(splits.train))) as advance:
            fit(network, splits.as_splits(), spec, self.device, advance)
        record = {"task": task, "classes": list(splits.classes), "seconds": time.perf_counter() - began}
        with replacing_folder(folder) as scratch:
            write_safetensors(scratch / _EXPERT, self._backbone())
            write_safetensors(scratch / _HEAD, self._current_head())
            write_json(scratch / "record.json", {**self._expert_determinants(task), **record})


class _ByTask(Mapping[str, dict[str, Tensor]]):
    """Weights by task, found or made when they are asked for."""

    def __init__(self, tasks: Sequence[str], find: Callable[[str], dict[str, Tensor]]) -> None:
        self._tasks, self._find = tuple(tasks), find

    def __getitem__(self, task: str) -> dict[str, Tensor]:
        if task not in self._tasks:
            raise KeyError(task)
        return self._find(task)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _has_bias(layer: nn.Linear) -> bool:
    return "bias" in dict(layer.named_parameters())
