"""A program's own validation and test loops on any weights, on one device.

The Trainer is made like the program's own: of its class, with its settings and its loggers, which write nothing, and with a
copy of its checkpoint callback. Its other callbacks have no say: one that swaps weights would have them evaluated in the
place of the weights that were given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from soups.errors import ConfigError
from soups.launch.own_program.interception import Fit
from soups.launch.own_program.loggers import muted_loggers
from soups.launch.own_program.module_weights import load_weights
from soups.launch.own_program.validation_data import Observer, ValidationData, data_section
from soups.weights import Weights

# Settings of a trainer that this one has otherwise: where it runs, what it shows, and whom it tells.
_OTHERWISE = {
    "devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False, "fast_dev_run": False,
    "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "profiler": None,
}  # fmt: skip
# Settings that are read off a trainer that nobody saw being made.
_READ_OFF = ("precision", "limit_val_batches", "limit_test_batches", "max_epochs", "max_steps")


class Evaluation:
    """Validate and test the module of a fit with any weights.

    Args:
        fit: of the program.
        config: what of its configuration decides the weights, for the digest of its data.
        varied: keys that the sweep varies.

    Attributes:
        trainer: that evaluates.
        data: the data of the last validation; None before the first.
    """

    def __init__(self, fit: Fit, config: Mapping[str, Any] | None = None, varied: tuple[str, ...] = ()) -> None:
        self.fit = fit
        self.data: ValidationData | None = None
        self._section = data_section(config or {}, varied)
        with fit.surroundings(), muted_loggers():
            self.trainer = _trainer_like(fit)

    def validate(self, weights: Weights | None = None) -> dict[str, float]:
        """Return what `trainer.validate` logs for some weights, or for the module as it is.

        Raises:
            ConfigError: the program has no validation loop or data.
        """
        loaders = self.fit.arguments.get("val_dataloaders")
        observer = Observer()
        found = self._run(self.trainer.validate, "validate", weights, loaders, observer)
        self.data = observer.found(self.trainer.val_dataloaders, self._section)
        return found

    def test(self, weights: Weights) -> dict[str, float]:
        """Return what `trainer.test` logs for some weights; nothing where the program has no test loop or data."""
        if not self.can_test():
            return {}
        return self._run(self.trainer.test, "test", weights, None, Observer())

    def can_test(self) -> bool:
        """Tell whether the program has a test loop and data for it."""
        package = self.fit.package
        source = self.fit.arguments.get("datamodule") or self.fit.module
        own, base = type(source).test_dataloader, package.LightningDataModule.test_dataloader
        inherited = own in (base, package.LightningModule.test_dataloader)
        return not inherited and type(self.fit.module).test_step is not package.LightningModule.test_step

    def _run(
        self, loop: Callable[..., Any], name: str, weights: Weights | None, loaders: Any, observer: Observer
    ) -> dict[str, float]:
        module, before = self.fit.module, getattr(self.fit.module, "_trainer", None)
        data = self.fit.arguments.get("datamodule")
        if weights is not None:
            load_weights(module, weights)
        # Only this process evaluates: a torchmetrics.Metric must not wait for the other ranks of the fit to gather from.
        metrics: list[Any] = [part for part in module.modules() if hasattr(part, "distributed_available_fn")]
        gathering = [(part, part.distributed_available_fn) for part in metrics]
        for part in metrics:
            part.distributed_available_fn = _alone
        watch = _watching(self.fit.package, observer)
        self.trainer.callbacks.append(watch)
        try:
            with self.fit.surroundings(), muted_loggers():
                found = loop(module, dataloaders=loaders, datamodule=data, verbose=False)
        except Exception as error:
            if type(error).__name__ != "MisconfigurationException":  # there is one in each package
                raise
            raise ConfigError(
                f"trainer.{name} does not run on this program, and a soup is chosen by its validation: {error}"
            ) from error
        finally:
            self.trainer.callbacks.remove(watch)
            for part, available in gathering:
                part.distributed_available_fn = available
            if before is not None:
                module.trainer = before
                if data is not None:
                    data.trainer = before
        return {key: float(value) for row in found for key, value in row.items()}


def _trainer_like(fit: Fit) -> Any:
    """Return a trainer of the same class and settings as the fit's, on one device."""
    owner, package = fit.trainer, fit.package
    options = dict(fit.options) or {name: getattr(owner, name) for name in _READ_OFF}
    options.setdefault("inference_mode", owner.validate_loop.inference_mode)
    checkpoint = owner.checkpoint_callback
    options |= {
        **_OTHERWISE,
        "accelerator": owner.accelerator.name() if hasattr(owner.accelerator, "name") else "auto",
        "precision": options.get("precision"),
        "logger": list(owner.loggers) or False,
        "callbacks": [copy.copy(checkpoint)] if checkpoint is not None else [],
        "enable_checkpointing": checkpoint is not None,
        "default_root_dir": owner.default_root_dir,
    }
    if options.get("barebones"):  # it forbids loggers, checkpoints and everything else that may be asked for
        for name in (
            "logger",
            "enable_checkpointing",
            "callbacks",
            *(key for key in _OTHERWISE if key.startswith("enable_")),
        ):
            options.pop(name, None)
    if options.get("plugins"):
        options["plugins"] = [plugin for plugin in _listed(options["plugins"]) if not hasattr(plugin, "world_size")]
    made = object.__new__(type(owner))
    package.Trainer.__init__(made, **options)
    for name, value in vars(owner).items():  # of a Trainer of the program's own
        if name not in vars(made):
            setattr(made, name, value)
    return made


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportUnknownVariableType]


def _watching(package: Any, observer: Observer) -> Any:
    """Return a callback that shows an observer each validation batch."""

    class Watch(package.Callback):
        def on_validation_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if not trainer.sanity_checking:
                observer.see(batch, dataloader_idx)

    return Watch()


def _alone() -> bool:
    return False
