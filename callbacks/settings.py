"""The options that every averaging callback takes, checked when the callback is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

import lightning.pytorch as pl
import torch

from soups.averaging.checkpoint import RAW
from soups.averaging.mean import DTYPES, MeanOptions
from soups.averaging.units import RunLength, Schedule
from soups.errors import ConfigError, did_you_mean

Evaluate = Literal["raw", "average", "both"]
Predict = Literal["raw", "average"]
Buffers = Literal["average", "live", "reestimate"]


class Common(TypedDict, total=False):
    """Keyword arguments that every averaging callback takes; `Settings` says what they mean."""

    name: str
    validate: Evaluate
    test: Evaluate
    predict: Predict
    buffers: Buffers
    batches: int
    forward: Callable[[pl.LightningModule, Any], Any] | None
    dtype: str | torch.dtype | None
    device: str | torch.device | None
    seed: int
    background: bool | None
    fused: bool
    log_distance: bool


class Started(Common, total=False):
    """`Common` and when the first point is taken."""

    start: str


class Options(Started, total=False):
    """`Started` and the spacing of the points."""

    every: str


@dataclass
class Settings:
    """When points are taken, which weights are evaluated, and how buffers are treated.

    Attributes:
        name: name of the average, in checkpoints and after the metrics' names.
        start: where the first point lies: optimizer steps ("1000st"), epochs ("1ep") or a share of the run ("75%").
        every: spacing of the points. A whole number of epochs takes them at the ends of epochs.
        validate: weights for validation in a fit. "raw" leaves it alone; "average" evaluates the average instead, under
            the plain names; "both" evaluates the raw weights under the plain names and then the average under the names
            with `_<name>` added.
        test: the same for `trainer.test` and `trainer.validate`.
        predict: weights for `trainer.predict`.
        buffers: running means and variances (BatchNorm and its relatives). "average": averaged as the weights are; "live":
            those of the raw weights; "reestimate": measured anew, with `batches` training batches, before every validation
            and at the end of every epoch. All other buffers (masks, tables, vectors of spectral norm, counters) are always
            those of the raw weights.
        batches: training batches for "reestimate".
        forward: forward pass for "reestimate", from module and batch; `training_step` when None.
        dtype: dtype of the average; float32 when None. "bfloat16" is rounded stochastically.
        device: device of the average; the weights' when None.
        seed: seed of stochastic rounding.
        background: take points in by a thread, while training goes on; when None, only for `device="cpu"` in a run on a
            GPU. Costs one copy of the weights on the host.
        fused: update with a compiled kernel, several averages for little more than one; see `soups.averaging.MeanOptions`.
        log_distance: log ‖average - raw‖₂ as `distance/<name>` at the end of every epoch.
    """

    name: str
    start: str = "0st"
    every: str = "1st"
    validate: Evaluate = "raw"
    test: Evaluate = "raw"
    predict: Predict = "raw"
    buffers: Buffers = "average"
    batches: int = 100
    forward: Callable[[pl.LightningModule, Any], Any] | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    seed: int = 0
    background: bool | None = None
    fused: bool = False
    log_distance: bool = False

    def __post_init__(self) -> None:
        if self.name == RAW or "/" in self.name or not self.name:
            raise ConfigError(
                f"name={self.name!r} cannot be an average's name: 'raw' is taken, and '/' separates names."
            )
        Schedule(self.start, "1st", RunLength(steps_per_epoch=10**6, steps=10**9, epochs=1000))
        Schedule("0st", self.every, RunLength(steps_per_epoch=10**6, steps=10**9, epochs=1000))
        for option, value, kind in (
            ("validate", self.validate, Evaluate),
            ("test", self.test, Evaluate),
            ("predict", self.predict, Predict),
            ("buffers", self.buffers, Buffers),
        ):
            if value not in get_args(kind):
                hint = did_you_mean(str(value), get_args(kind))
                raise ConfigError(f"{option}={value!r} is not a choice: {hint}")
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not a choice: {did_you_mean(self.dtype, DTYPES)}")
        if self.batches < 1:
            raise ConfigError(f"batches={self.batches} measures nothing; give at least 1.")

    def keep(self, covers: Callable[[str], bool] | None) -> MeanOptions:
        """Return what the average itself is to be told."""
        return MeanOptions(
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
            background=self.background,
            fused=self.fused,
            covers=covers,
        )


def settings_of(options: Common, **defaults: Any) -> Settings:
    """Return the settings, refusing unknown options with a hint.

    Raises:
        ConfigError: an unknown option, or a value that is not a choice.
    """
    allowed = [field.name for field in fields(Settings)]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"There is no option {option!r}: {did_you_mean(option, allowed)}")
    given: dict[str, Any] = {**defaults, **options}
    return Settings(**given)
