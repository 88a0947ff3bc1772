"""`FitSpec`: the typed description of all settings that decide a fit's weights, and the fingerprint of a fit.

    spec = FitSpec.of(configuration)                # from a command's whole configuration
    spec.with_(seed=3, optimizer={"lr": 1e-4})      # a changed copy: sections are merged and checked again
    spec.with_(data=section)                        # `model`, `data` and `callbacks` sections are replaced
    spec.on(split=splits.hash(), base_model=hash)   # data and base model by content: see below
    fingerprint(spec)                               # the same function for runs, sweeps and protocol nodes
    spec.plain(); FitSpec.read(values)              # to JSON values (a node's parameters), and back

Every field decides the weights, and no other setting does. `train(spec, layout, base_model)` reads the other settings from a
`Layout` (paths, devices, tracking, loader workers). The layout changes results by rounding at most.

**Content.** At first, sections describe the data and the base model: `data`, `model` with its `pretrained`, and `start`. Once the
hashes `split` (of the samples) and `base_model` (of the weights) are known, they replace these sections in the fingerprint. A
data folder may therefore move, and two configurations with the same base model have the same fingerprint.

**Validation.** A callback can end the fit at a validation (early stopping). With callbacks, the times and size of validation are
therefore part of the description, as `validation`. Without callbacks they belong to the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from soups.errors import ConfigError
from soups.fitting.schema import (
    Count,
    CountOrNone,
    Flag,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    ShareBelowOne,
    Target,
    checked,
)
from soups.stores.files import fingerprint as hash_json

# Raise it when a change of this code changes the weights that the same settings give.
TRAINING_VERSION = 1
# The value of `ingredient.weights` that keeps the last weights and no average.
RAW = "raw"


class Optimizer(Section):
    """Optimiser and schedule; see `soups.tasks.optimisation.optimizer_and_schedule`."""

    name: Literal["adamw", "sgd"]
    lr: Positive
    weight_decay: NotNegative
    warmup: Share
    schedule: Literal["cosine", "constant"]
    floor: Share = 0.0
    momentum: ShareBelowOne = 0.9
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        given = self.model_fields_set
        for key, allowed, value in (
            ("momentum", self.name == "sgd", f"name={self.name}"),
            ("betas", self.name == "adamw", f"name={self.name}"),
            ("floor", self.schedule == "cosine", f"schedule={self.schedule}"),
        ):
            if key in given and not allowed:
                raise ValueError(f"optimizer.{key} would do nothing with optimizer.{value}: leave it out.")
        return self


class Task(Section):
    """The loss, BatchNorm freezing and the memory format."""

    label_smoothing: ShareBelowOne = 0.0
    freeze_batchnorm: Flag = True
    channels_last: Flag = True


class Augment(Section):
    """Random changes of training images; see `soups.tasks.images.Augmentation`."""

    num_ops: CountOrNone = 0
    magnitude: CountOrNone = 0
    min_crop: Share = 1.0
    flip: Flag = False


class Start(Section):
    """The making of the base model: a linear probe, then epochs that all ingredients share."""

    probe: Flag
    seed: Seed
    epochs: CountOrNone
    optimizer: Optimizer
    augment: Augment | None


class TrainerSpec(Section):
    """Settings of Lightning's Trainer that decide the weights."""

    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    limit_train_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    precision: str = "32-true"
    gradient_clip_val: NotNegative | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    accumulate_grad_batches: Count = 1
    sync_batchnorm: Flag = False
    reload_dataloaders_every_n_epochs: CountOrNone = 0
    fast_dev_run: bool | int = False


class Validation(Section):
    """The times of validation, and the number of validation batches."""

    check_val_every_n_epoch: Count | None = 1
    limit_val_batches: int | float | None = None
    val_check_interval: int | float | None = None


class LoaderSpec(Section):
    """The input's size (an image's side in pixels, or a text's most tokens) and the global batch size."""

    size: Count
    batch_size: Count


class ProbeSpec(Section):
    """The settings that decide the weights of the linear probe, which is the base model before its shared epochs."""

    model: Target
    probe: Flag
    seed: Seed
    size: Count
    split: str

    def determinants(self) -> dict[str, Any]:
        """Return the values that the fingerprint is computed from."""
        return {"training_version": TRAINING_VERSION, **self.plain()}


class FitSpec(Section):
    """The settings that decide the weights of one fit.

    Attributes:
        model, data: sections with `_target_`.
        seed: the seed of data order, augmentation and dropout.
        task, optimizer, augment, loader, trainer: sections as in `conf/train.yaml`, reduced to settings that decide weights.
        validation: see the module; None without callbacks.
        callbacks: sections with `_target_`, by name.
        keep: the weights to keep: "raw" for the last weights, or the name of a callback's average.
        start: the making of the base model; None if the caller provides the base model.
        base_model: the hash of the base model's weights; None until it is known.
        split: the hash of the data; None until it is known.
    """

    model: Target
    data: Target
    seed: Seed
    task: Task
    optimizer: Optimizer
    augment: Augment | None
    loader: LoaderSpec
    trainer: TrainerSpec
    validation: Validation | None = None
    callbacks: dict[str, Target] = Field(default_factory=dict[str, Target])
    keep: str = RAW
    start: Start | None = None
    base_model: str | None = None
    split: str | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return the description from the values of `plain`.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        return checked(cls, dict(values))

    def with_(self, **changes: Any) -> Self:
        """Return a copy of the description with changed fields.

        A mapping is merged into a section (`optimizer={"lr": 1e-4}`); `model`, `data` and `callbacks` are replaced whole.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        values = self.plain()
        for name, change in changes.items():
            plain = change.plain() if isinstance(change, Section) else change
            kept = {} if name in ("model", "data", "callbacks") else values.get(name) or {}
            values[name] = {**kept, **plain} if isinstance(plain, Mapping) else plain
        return checked(type(self), values)

    def on(self, split: str | None = None, base_model: str | None = None) -> Self:
        """Return a copy of the description with the hashes of data and base model."""
        return self.model_copy(update={"split": split or self.split, "base_model": base_model or self.base_model})

    def determinants(self) -> dict[str, Any]:
        """Return the fingerprint's values: every field, with `data` and `start` replaced by their hashes once known."""
        found = self.plain()
        model = {key: value for key, value in self.model.items() if key != "pretrained" or self.base_model is None}
        determined: dict[str, Any] = {
            "training_version": TRAINING_VERSION,
            "start": self.base_model or found.get("start"),
            "split": self.split or self.data,
            "model": model,
            "size": self.loader.size,
            "batch_size": self.loader.batch_size,
            "callbacks": self.callbacks,
            "weights": self.keep,
        }
        determined |= {key: found[key] for key in ("seed", "task", "optimizer", "augment", "trainer")}
        if self.validation is not None:
            determined["validation"] = found["validation"]
        return determined

    def probe(self) -> ProbeSpec:
        """Return the description of the linear probe.

        Raises:
            ConfigError: the description has no `start` or no `split`.
        """
        start, split = self._start(), self.split
        if split is None:
            raise ConfigError("The linear probe is named by its data: build the splits first, spec.on(split=…).")
        return ProbeSpec(model=self.model, probe=start.probe, seed=start.seed, size=self.loader.size, split=split)

    def shared_epochs(self, probe: str) -> Self:
        """Return the fit of the shared epochs, which starts from the linear probe with this weights hash."""
        start = self._start()
        values = self.plain()
        return checked(
            type(self),
            {
                **values,
                "seed": start.seed,
                "optimizer": start.optimizer.plain(),
                "augment": start.augment and start.augment.plain(),
                "task": {**values["task"], "label_smoothing": 0.0},
                "trainer": {**values["trainer"], "max_epochs": start.epochs},
                "validation": None,
                "callbacks": {},
                "keep": RAW,
                "base_model": probe,
            },
        )

    def _start(self) -> Start:
        if self.start is None:
            raise ConfigError("This fit starts from weights that its caller gives; it has no start section.")
        return self.start


class Determined(Protocol):
    """A description of the settings that decide a fit: `FitSpec`, `ProbeSpec`, or that of a user's own program."""

    def determinants(self) -> dict[str, Any]:
        """Return the values that the fingerprint is computed from, as JSON values."""
        ...


def fingerprint(spec: Determined) -> str:
    """Return the name of a fit's result: the SHA-256 (hex) of its determinants.

    >>> values = {"model": {"_target_": "m"}, "data": {"_target_": "d"}, "seed": 0, "task": {}, "augment": None}
    >>> values |= {"optimizer": {"name": "sgd", "lr": 1, "weight_decay": 0, "warmup": 0, "schedule": "constant"}}
    >>> spec = FitSpec.read({**values, "loader": {"size": 8, "batch_size": 4}, "trainer": {"max_epochs": 1}})
    >>> fingerprint(spec) == fingerprint(spec.with_(seed=1)), fingerprint(spec) == fingerprint(FitSpec.read(spec.plain()))
    (False, True)
    """
    return hash_json(spec.determinants())
