"""One fit of one module under one or more averaging callbacks: counting, updating, swapping, evaluating."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from soups.averaging.checkpoint import overlay, plain_name
from soups.averaging.mean import Mean, release, update
from soups.averaging.swapping import Swap, slots
from soups.averaging.units import Plan, Schedule
from soups.errors import ConfigError, did_you_mean
from soups.weights import is_averaged

from . import saving
from .batchnorm import remeasure
from .evaluation import evaluate_beside
from .plan import plan_of
from .quiet import SpareMetrics
from .settings import Evaluate, Settings
from .sharding import any_sharded, like, local, refuse_opaque, reshard, shard_of

if TYPE_CHECKING:
    from .base import Averaging


@dataclass
class Tracked:
    """One average in a fit."""

    name: str
    settings: Settings
    mean: Mean
    schedule: Schedule
    last_point: int = -1
    # BatchNorm statistics measured for the average, and the number of points it had then.
    statistics: dict[str, Tensor] = field(default_factory=dict)
    measured_at: int = 0
    metrics: SpareMetrics = field(default_factory=SpareMetrics)


class Session:
    """The averages of one module through a fit, and through the evaluations that follow it.

    Args:
        trainer: the Trainer.
        module: the module whose weights are averaged.
        members: the callbacks that say what is averaged.

    Raises:
        ConfigError: two averages of one name, two that both want to be validated under the plain names, or a strategy
            whose weights cannot be averaged.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, members: list[Averaging]) -> None:
        self.trainer = trainer
        self.module = module
        self.members = members
        self.tracked: dict[str, Tracked] = {}
        self.steps = 0
        self.epochs = 0
        self.plan = Plan()
        self.begun = False
        # What a checkpoint held, until the averages are there to take it; in evaluations, what is evaluated.
        self.loaded: dict[str, Any] | None = None
        self._dirty = False
        self._handles: list[Any] = []
        self._frozen: dict[str, tuple[dict[str, Any], str]] = {}
        self._cells: dict[str, tuple[dict[str, Any], str]] = {}
        self._buffers: set[str] = set()
        self._swap: Swap | None = None
        self._evaluating = False
        self._check()

    def _check(self) -> None:
        names = [member.settings.name for member in self.members]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Two averages are called {name!r}. Give each a name of its own: EMA(name='slow').")
        for what in ("validate", "test", "predict"):
            plain = [m.settings.name for m in self.members if getattr(m.settings, what) == "average"]
            if len(plain) > 1:
                raise ConfigError(
                    f"{' and '.join(plain)} both ask for {what}='average', and only one can be evaluated under the plain "
                    f"names of the metrics. Use {what}='both' for all but one."
                )

    # Attaching ------------------------------------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer, *, evaluating: bool) -> None:
        """Hook into the module's saving and loading, for a fit or an evaluation."""
        self.trainer = trainer
        self._evaluating = evaluating
        if evaluating:
            self.loaded = None
        else:
            refuse_opaque(trainer)
        saving.install(self.module, self)

    def detach(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self) -> None:
        """Make the averages for a run whose length is known now, and listen to the optimizers."""
        self.plan = plan_of(self.trainer)
        self._find_tensors()
        for member in self.members:
            settings = member.settings
            covers = self._covers(settings)
            for name, mean in member.make(self.plan, covers).items():
                schedule = Schedule(settings.start, settings.every, self.plan, last=member.includes_last)
                self.tracked[name] = Tracked(name, settings, mean, schedule)
        self.begun = True
        if self.loaded is not None:
            self.restore(self.loaded)
            self.loaded = None
        for optimizer in self.trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        for member in self.members:
            member.on_begin(self, self.trainer)

    def _covers(self, settings: Settings) -> Any:
        if settings.buffers == "average":
            return None
        return lambda name: name not in self._buffers

    def _find_tensors(self) -> None:
        """Find trainable parameters and floating persistent buffers, tied ones once, where their owners keep them."""
        self._cells, self._buffers, self._frozen = {}, set(), {}
        seen: set[int] = set()
        for prefix, layer in self.module.named_modules():
            for key, parameter in layer._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                (self._cells if parameter.requires_grad else self._frozen)[name] = (layer._parameters, key)
            for key, buffer in layer._buffers.items():
                if buffer is None or key in layer._non_persistent_buffers_set or not is_averaged(buffer):
                    continue
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    name = plain_name(f"{prefix}.{key}" if prefix else key)
                    self._cells[name] = (layer._buffers, key)
                    self._buffers.add(name)

    def weights(self) -> dict[str, Tensor]:
        """Return what is averaged, as it is now: trainable parameters and floating buffers, this process's shards."""
        return {name: local(cell[key]) for name, (cell, key) in self._cells.items()}

    def originals(self) -> dict[str, Tensor]:
        """Return the module's tensors of the same names, DTensors whole."""
        return {name: cell[key] for name, (cell, key) in self._cells.items()}

    # Counting -------------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        release([tracked.mean for tracked in self.tracked.values()])
        # A parameter that was unfrozen since has been constant until now, and so has its average.
        for name in [name for name, (cell, key) in self._frozen.items() if cell[key].requires_grad]:
            parameter = self.track_frozen(name)
            for tracked in self.tracked.values():
                tracked.mean.admit(name, local(parameter.detach()))

    def track_frozen(self, name: str) -> Tensor:
        """Count a parameter, frozen until now, among those that are averaged; return it."""
        if name in self._frozen:
            cell, key = self._frozen.pop(name)
            self._cells[name] = (cell, key)
        cell, key = self._cells[name]
        return cell[key]

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        # Fused optimizers under a gradient scaler are called even for a step that they skip.
        skipped = getattr(optimizer, "found_inf", None)
        if not (isinstance(skipped, Tensor) and bool(skipped.item())):
            self._dirty = True

    def after_batch(self) -> None:
        """Take the points that are due after a training batch."""
        if not self.begun:
            return
        moved, self._dirty = self._dirty, False
        epoch_end = bool(self.trainer.is_last_batch)
        self.steps += moved
        if moved or epoch_end:
            self._take(epoch_end)

    def after_epoch(self) -> None:
        """Close an epoch: its point, if no last batch has taken it, statistics, distances."""
        if not self.begun:
            return
        if self.epochs <= self.trainer.current_epoch:
            self._take(epoch_end=True)
        self._remeasure()
        for tracked in self.tracked.values():
            if tracked.settings.log_distance and tracked.mean.count:
                self.module.log(f"distance/{tracked.name}", self.distance(tracked.name), sync_dist=False)

    def _take(self, epoch_end: bool) -> None:
        epoch = self.trainer.current_epoch + 1 if epoch_end else self.trainer.current_epoch
        if epoch_end:
            self.epochs = epoch
        due = [
            tracked
            for tracked in self.tracked.values()
            if self.steps and tracked.schedule.due(self.steps, epoch, epoch_end=epoch_end)
            if tracked.last_point != self.steps
        ]
        if due:
            weights = self.weights()
            # Averages of one spacing are updated in one pass; its plan is kept as long as they stay together.
            spacings: dict[tuple[object, ...], list[Tracked]] = {}
            for tracked in due:
                spacings.setdefault((tracked.settings.start, tracked.settings.every), []).append(tracked)
            for together in spacings.values():
                # Parameters wait for the optimizer, but the next forward pass already changes buffers.
                update([tracked.mean for tracked in together], weights, released=bool(self._buffers))
            for tracked in due:
                tracked.last_point = self.steps
        for member in self.members:
            member.after_step(self, self.trainer, epoch_end=epoch_end)

    def end(self) -> None:
        """Warn of averages that hold nothing after all."""
        self._remeasure()
        for tracked in self.tracked.values():
            if tracked.mean.count == 0:
                warnings.warn(
                    f"The average {tracked.name!r} was never started: its start={tracked.settings.start!r} lies beyond the "
                    f"{self.steps} optimizer steps of this run. The module keeps its own weights, and no average is saved.",
                    stacklevel=2,
                )

    # The averages ---------------------------------------------------------------------------------------------------

    def value(self, name: str) -> dict[str, Tensor]:
        """Return an average's tensors by plain name, this process's shards, measured statistics included.

        Raises:
            ConfigError: there is no average of this name.
            WeightsError: it holds nothing yet.
        """
        held = (self.loaded or {}).get("averages", {})
        if self._evaluating and name in held:
            entry = saving.whole_entry(held[name], name, self)
            originals = slots(self.module)
            merged = {**entry["weights"], **entry.get("buffers", {})}
            return {key: shard_of(t, originals[key]) if key in originals else t for key, t in merged.items()}
        # A checkpoint that was loaded and lacks the average must not be tested on one that happens to be in memory.
        if name not in self.tracked or (self._evaluating and self.loaded is not None):
            known = did_you_mean(name, held if self.loaded is not None else self.tracked)
            raise ConfigError(
                f"There is no average called {name!r}: neither does the checkpoint that was loaded hold it, nor, without a "
                f"checkpoint, did this process train one. {known[:1].upper()}{known[1:]}"
            )
        tracked = self.tracked[name]
        return {**tracked.mean.value(), **tracked.statistics}

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return an average as a full state dict of the module, in memory of its own."""
        with torch.no_grad():
            raw = {key: tensor.detach().clone() for key, tensor in self.module.state_dict().items()}
            whole = slots(self.module)
            held = {key: tensor.detach().clone() for key, tensor in self.value(name).items()}
            value = {key: like(t, whole[key]) if key in whole else t for key, t in held.items()}
            return overlay(raw, value, self.tied())

    def tied(self) -> dict[str, str]:
        """Map names that repeat a tensor to the first name, by object identity as `named_parameters` sees it."""
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        everything = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in everything:
            name = plain_name(name)
            if first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
        return tied

    def distance(self, name: str) -> float:
        """Return ‖average - raw‖₂ over the trainable parameters."""
        value, weights = self.value(name), self.weights()
        total = torch.zeros((), dtype=torch.float64)
        for key, tensor in weights.items():
            if key in value and key not in self._buffers:
                difference = tensor.detach().float() - value[key].to(tensor.device).float()
                # The sum stays where the weights are: NCCL adds up nothing on the CPU.
                total = total.to(tensor.device) + difference.square().sum(dtype=torch.float64)
        if any_sharded(self.originals()):
            torch.distributed.all_reduce(total)
        return math.sqrt(float(total))

    # Swapping and evaluating ------------------------------------------------------------------------------------------

    @property
    def swapped(self) -> bool:
        """Whether the module holds an average now."""
        return self._swap is not None and self._swap.active

    def raw(self) -> dict[str, Tensor]:
        """Return the raw tensors that are out of the module now."""
        return self._swap.raw() if self._swap is not None else {}

    def swap_in(self, name: str) -> None:
        """Put an average into the module."""
        value = self.value(name)
        reshard(self.module)
        known = self.originals()
        self._swap = Swap(known if self.begun and value.keys() <= known.keys() else slots(self.module))
        self._swap.enter(value)

    def swap_out(self) -> None:
        """Bring the module's own weights back, if they are out."""
        if self._swap is not None:
            reshard(self.module)
            self._swap.exit()
            self._swap = None

    @contextlib.contextmanager
    def holding(self, name: str) -> Generator[None]:
        """Within the block the module holds an average."""
        try:
            self.swap_in(name)
            yield
        finally:
            self.swap_out()

    def _choice(self, settings: Settings) -> Evaluate:
        fn = self.trainer.state.fn
        if fn == TrainerFn.FITTING:
            return settings.validate
        return settings.predict if fn == TrainerFn.PREDICTING else settings.test

    def _has(self, name: str) -> bool:
        return name in self.tracked and self.tracked[name].mean.count > 0

    def _chosen(self, choice: Evaluate) -> list[str]:
        """Name the averages that are evaluated in this way now; none while Lightning checks that validation runs."""
        if self.trainer.sanity_checking:
            return []
        names = [m.settings.name for m in self.members if self._choice(m.settings) == choice]
        if self.trainer.state.fn == TrainerFn.FITTING:
            return [name for name in names if self._has(name)]
        for name in names:
            self.value(name)  # outside a fit an average that is not there is an error, not a silent switch
        return names

    def before_evaluation(self) -> None:
        """Put an average in place of the raw weights, where the user asked for that."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._remeasure()
        for name in self._chosen("average"):
            self.swap_in(name)

    def after_evaluation(self) -> None:
        """Bring the raw weights back, and evaluate the averages that were asked for beside them."""
        self.swap_out()
        for name in self._chosen("both"):
            metrics = self.tracked[name].metrics if name in self.tracked else SpareMetrics()
            with self.holding(name):
                evaluate_beside(self.trainer, self.module, f"_{name}", metrics)

    def _remeasure(self) -> None:
        """Measure BatchNorm statistics for averages that have moved since the last time."""
        for tracked in self.tracked.values():
            settings = tracked.settings
            if settings.buffers != "reestimate" or not tracked.mean.count or tracked.measured_at == tracked.mean.count:
                continue
            with self.holding(tracked.name):
                tracked.statistics = remeasure(self.trainer, self.module, settings.batches, settings.forward)
            tracked.measured_at = tracked.mean.count

    # Saving and restoring ---------------------------------------------------------------------------------------------

    def restore(self, content: dict[str, Any]) -> None:
        """Take over what a checkpoint held."""
        saving.restore(self, content)
