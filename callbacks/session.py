"""One fit of one module under one or more averaging callbacks: counting, updating, swapping, evaluating."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from soups.averaging.checkpoint import overlay
from soups.averaging.mean import release, update
from soups.averaging.places import find_places
from soups.averaging.swapping import Swap, slots
from soups.averaging.units import Schedule
from soups.errors import ConfigError, did_you_mean
from soups.stores.averages import sources

from . import saving
from .averaged_fit import AveragedFit, Averager, Tracked
from .batchnorm import remeasure
from .branches import Branches
from .evaluation import evaluate_beside
from .reach import state_of
from .run_length import run_length_of, steps_before
from .settings import Evaluate, Settings
from .sharding import any_sharded, like, local, refuse_opaque, reshard
from .tensors import Tensors


class Session(AveragedFit):
    """A fit, and the evaluations that follow it: counts steps, updates, swaps, evaluates.

    Args:
        trainer: the Trainer.
        module: the module whose weights are averaged.
        averagers: the callbacks that say what is averaged.

    Raises:
        ConfigError: see `AveragedFit`; or a strategy whose weights cannot be averaged.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, averagers: list[Averager]) -> None:
        super().__init__(trainer, module, averagers)
        # Steps that an earlier fit of the same module and Trainer has counted.
        self.earlier: int | None = None
        self._dirty = False
        self._handles: list[Any] = []
        self._optimizers: list[Any] = []
        self._branches = self._new_branches()

    def _new_branches(self) -> Branches:
        return Branches(
            lambda copied: state_of(self.trainer, self.module, skip=map(id, self.originals().values()), copied=copied)
        )

    # Attaching ------------------------------------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer, *, evaluating: bool) -> None:
        """Hook into the module's saving and loading, for a fit or an evaluation."""
        self.trainer = trainer
        self.evaluating = evaluating
        if evaluating:
            self.loaded = None
            self._branches = self._new_branches()
        else:
            refuse_opaque(trainer)
        saving.install(self.module, self)

    def detach(self) -> None:
        """Let go of the optimizers, and of the states of user code."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
        self._branches = self._new_branches()

    def begin(self) -> None:
        """Make the averages for a run whose length is known now, and listen to the optimizers."""
        self.plan = run_length_of(self.trainer)
        self._tensors = Tensors(self.module)
        # A Trainer that goes on (a higher `max_epochs`) counts epochs from the beginning of its first fit.
        self.epochs = self.trainer.current_epoch
        self.steps = steps_before(self.trainer) if self.earlier is None else self.earlier
        for averager in self.averagers:
            settings = averager.settings
            covers = self._covers(settings)
            for name, mean in averager.make(self.plan, covers).items():
                schedule = Schedule(settings.start, settings.every, self.plan, last=averager.includes_last)
                self.tracked[name] = Tracked(name, settings, mean, schedule)
        self.begun = True
        content, self.loaded = self.loaded, None
        if content is not None:
            saving.restore(self, content)
        self._listen()
        for averager in self.averagers:
            averager.on_begin(self, self.trainer, (content or {}).get("runs", {}).get(averager.settings.name))

    def _listen(self) -> None:
        """Hook into the optimizers' steps; anew if the run has exchanged its optimizers."""
        if len(self._optimizers) == len(self.trainer.optimizers) and all(
            one is other for one, other in zip(self._optimizers, self.trainer.optimizers, strict=True)
        ):
            return
        for handle in self._handles:
            handle.remove()
        self._optimizers, self._handles = list(self.trainer.optimizers), []
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _covers(self, settings: Settings) -> Any:
        if settings.buffers == "average":
            return None
        return lambda name: name not in self.tensors.buffers

    # Counting -------------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        release([tracked.mean for tracked in self.tracked.values()])
        # A parameter that was unfrozen since has been constant until now, and so has its average.
        for name in self.tensors.thawed():
            parameter = self.tensors.thaw(name)
            for tracked in self.tracked.values():
                tracked.mean.admit(name, local(parameter.detach()))

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        # Fused optimizers under a gradient scaler are called even for a step that they skip.
        skipped = getattr(optimizer, "found_inf", None)
        if not (isinstance(skipped, Tensor) and bool(skipped.item())):
            self._dirty = True

    def before_batch(self) -> None:
        """See to it that the optimizers of this batch are listened to."""
        self.settle()
        if self.begun:
            self._listen()

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
        self.settle()
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
            for tracked in due:
                extra = tracked.mean.count and not tracked.schedule.regular(self.steps, epoch, epoch_end=epoch_end)
                tracked.before_last = tracked.mean.undo_state() if extra else None
            # Averages of one spacing are updated in one pass; its plan is kept as long as they stay together.
            spacings: dict[tuple[object, ...], list[Tracked]] = {}
            for tracked in due:
                spacings.setdefault((tracked.settings.start, tracked.settings.every), []).append(tracked)
            for together in spacings.values():
                # Parameters wait for the optimizer, but the next forward pass already changes buffers.
                update([tracked.mean for tracked in together], weights, released=bool(self.tensors.buffers))
            for tracked in due:
                tracked.last_point = self.steps
        for averager in self.averagers:
            averager.after_step(self, self.trainer, epoch_end=epoch_end)

    def end(self) -> None:
        """Warn of averages that hold nothing after all, or NaN."""
        self.settle()
        self._remeasure()
        for tracked in self.tracked.values():
            if tracked.mean.count == 0:
                warnings.warn(
                    f"The average {tracked.name!r} was never started: its start={tracked.settings.start!r} lies beyond the "
                    f"{self.steps} optimizer steps of this run. The module keeps its own weights, and no average is saved.",
                    stacklevel=2,
                )
            self.check_finite(tracked.name)

    # The averages ---------------------------------------------------------------------------------------------------

    def value(self, name: str) -> dict[str, Tensor]:
        """Return an average's tensors by plain name, this process's shards, measured statistics included.

        Raises:
            ConfigError: there is no average of this name.
            WeightsError: it holds nothing yet.
        """
        held = (self.loaded or {}).get("averages", {})
        if self.evaluating and name in held:
            entry = saving.whole_entry(held[name], name, self)
            return saving.for_module(self, name, entry)
        # A checkpoint that was loaded and lacks the average must not be tested on one that happens to be in memory.
        if name not in self.tracked or (self.evaluating and self.loaded is not None):
            known = did_you_mean(name, held if self.loaded is not None else self.tracked)
            raise ConfigError(
                f"There is no average called {name!r}: neither does the checkpoint that was loaded hold it, nor, without a "
                f"checkpoint, did this process train one. {known[:1].upper()}{known[1:]}"
            )
        self.follow()
        tracked = self.tracked[name]
        return {**tracked.mean.value(), **tracked.statistics}

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Return an average as the module's own state dict has it, in memory of its own.

        Raises:
            WeightsError: an averaged tensor is not in the module's state dict, and the module's loading is strict.
        """
        with torch.no_grad():
            held = self.module.state_dict()
            whole = slots(self.module)
            places = find_places(held, whole, by_name=any_sharded(whole))
            content = {"places": places.names, "unknown": places.unknown, "strict": self.strict}
            value = {key: like(t, whole[key]) if key in whole else t for key, t in self.value(name).items()}
            where = f"{type(self.module).__name__}.state_dict()"
            copies = {key: t.detach().clone() if isinstance(t, Tensor) else t for key, t in held.items()}
            value = {key: tensor.detach().clone() for key, tensor in value.items()}
            return overlay(copies, value, sources(held, value, content, where=where))

    def write(self, name: str) -> None:
        """Write an average into the module's tensors, for good."""
        value, originals = self.value(name), slots(self.module)
        with torch.no_grad():
            for key, tensor in value.items():
                if key in originals:
                    target = local(originals[key])
                    target.copy_(tensor.to(target.device))

    def distance(self, name: str) -> float:
        """Return ‖average - raw‖₂ over the trainable parameters."""
        value, weights = self.value(name), self.weights()
        total = torch.zeros((), dtype=torch.float64)
        for key, tensor in weights.items():
            if key in value and key not in self.tensors.buffers:
                kind = torch.complex64 if tensor.is_complex() else torch.float32
                difference = tensor.detach().to(kind) - value[key].to(tensor.device, kind)
                # The sum stays where the weights are: NCCL adds up nothing on the CPU.
                total = total.to(tensor.device) + difference.abs().square().sum(dtype=torch.float64)
        if any_sharded(self.originals()):
            torch.distributed.all_reduce(total)
        return math.sqrt(float(total))

    # Swapping and evaluating ------------------------------------------------------------------------------------------

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
            swap, self._swap = self._swap, None
            if written := swap.exit():
                warnings.warn(
                    f"While an average was in the module, the evaluation wrote into {written[:4]}"
                    f"{f' and {len(written) - 4} more' if len(written) > 4 else ''}. The raw weights are back as they were; "
                    f"the average has been changed. Clone a weight before you change it in an evaluation hook.",
                    stacklevel=2,
                )

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
        if fn == "fit":
            return settings.validate
        return settings.predict if fn == "predict" else settings.test

    def _has(self, name: str) -> bool:
        return name in self.tracked and self.tracked[name].mean.count > 0

    def _asked(self, choice: Evaluate) -> list[str]:
        return [m.settings.name for m in self.averagers if self._choice(m.settings) == choice]

    def _chosen(self, choice: Evaluate) -> list[str]:
        """Name the averages that are evaluated in this way now; none while Lightning checks that validation runs."""
        if self.trainer.sanity_checking:
            return []
        names = self._asked(choice)
        if self.trainer.state.fn == "fit":
            return [name for name in names if self._has(name)]
        for name in names:
            self.value(name)  # outside a fit an average that is not there is an error, not a silent switch
        return names

    def before_evaluation(self) -> None:
        """Put an average in place of the raw weights, where the user asked for that."""
        fitting = self.trainer.state.fn == "fit"
        if fitting and not self.trainer.sanity_checking:
            self._remeasure()
        chosen = self._chosen("average")
        if self._asked("both"):
            self._branches.before()
        for name in chosen:
            self.check_finite(name)
            self.swap_in(name)

    def after_evaluation(self) -> None:
        """Bring the raw weights back, and evaluate the averages that were asked for beside them."""
        self.swap_out()
        if not self._branches.ready:
            return
        self._branches.after()
        for name in self._chosen("both"):
            self.check_finite(name)
            with self._branches.of(name), self.holding(name):
                evaluate_beside(self.trainer, f"_{name}")

    def settle(self) -> None:
        """Note the state that a validation has left in user code, once all of its hooks have run."""
        self._branches.settle()

    def _remeasure(self) -> None:
        """Measure BatchNorm statistics for averages that have moved since the last time."""
        for tracked in self.tracked.values():
            settings = tracked.settings
            if settings.buffers != "reestimate" or not tracked.mean.count or tracked.measured_at == tracked.mean.count:
                continue
            with self.holding(tracked.name):
                skip = map(id, self.originals().values())
                tracked.statistics = remeasure(
                    self.trainer, self.module, settings.batches, settings.forward, skip=list(skip)
                )
            tracked.measured_at = tracked.mean.count
