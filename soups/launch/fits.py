"""The fit inside a program that is not ours: taken over where it calls `Trainer.fit`, and its model evaluated."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from soups.callbacks import Averaging
from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.stores import open_store
from soups.weights import Weights

# Strategies that leave no rank with the whole model after a fit.
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class Fit:
    """One call of `trainer.fit`, before it runs.

    Attributes:
        trainer: whose `fit` was called.
        module: what it was to train.
        arguments: the call's other arguments by name: loaders, datamodule, ckpt_path.
        run: runs it.
    """

    trainer: lightning.Trainer
    module: lightning.LightningModule
    arguments: dict[str, Any]
    run: Callable[[], None]

    @property
    def processes(self) -> int:
        """The number of processes the trainer asks for on this machine."""
        return self.trainer.num_devices

    def check(self) -> None:
        """Check that the fit starts from the module as it is and leaves whole weights behind.

        Raises:
            ConfigError: it resumes a checkpoint, or it is sharded.
        """
        if self.arguments.get("ckpt_path") is not None:
            raise ConfigError(
                f"trainer.fit(ckpt_path={self.arguments['ckpt_path']!r}) goes on from another run's checkpoint, so it cannot "
                f"be an ingredient: those share one start. Load the checkpoint into the module before fit instead."
            )
        if (name := type(self.trainer.strategy).__name__) in _SHARDED:
            raise ConfigError(
                f"{name} leaves no process with the whole model. Use strategy=ddp for a soup's ingredients."
            )

    def initial_weights(self) -> dict[str, Tensor]:
        """Return a copy of the module's weights on the CPU.

        Raises:
            WeightsError: it has none: its layers are made later, in `setup` or during the fit.
        """
        self.module.configure_model()  # does nothing where it is not overridden, and nothing the second time
        weights = cpu_copy(self.module.state_dict())
        if not weights:
            raise WeightsError(
                f"{type(self.module).__name__} has no weights when trainer.fit is called. Make its layers in __init__ or in "
                f"configure_model, so that all ingredients can be given one start."
            )
        return weights


@contextlib.contextmanager
def fits_go_to(receive: Callable[[Fit], None]) -> Generator[None]:
    """Within the block, `trainer.fit(…)` calls `receive` instead; `Fit.run` is the real one."""
    original = lightning.Trainer.fit
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(self: lightning.Trainer, *arguments: Any, **named: Any) -> None:
        given = dict(signature.bind(self, *arguments, **named).arguments)
        given.pop("self")
        module = given.pop("model")
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        if isinstance(loaders := given.get("train_dataloaders"), lightning.LightningDataModule):
            given["datamodule"] = loaders
        receive(Fit(self, module, given, lambda: original(self, *arguments, **named)))

    lightning.Trainer.fit = fit
    try:
        yield
    finally:
        lightning.Trainer.fit = original


def cpu_copy(weights: Weights) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}


def monitor_of(trainer: lightning.Trainer) -> tuple[str | None, str]:
    """Return the metric that the trainer's checkpoints or early stopping watch, with "min" or "max"; None without one."""
    for callback in cast(list[Any], cast(Any, trainer).callbacks):
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor:
            return str(callback.monitor), str(callback.mode)
    return None, "max"


def finished_weights(fit: Fit, which: str) -> dict[str, Tensor]:
    """Return what a finished fit leaves behind, on the CPU.

    Args:
        fit: which has run.
        which: "raw" for the last weights, "best" for those of the best checkpoint, or the name of an average.

    Raises:
        ConfigError: there is no such thing.
    """
    if which == "raw":
        return cpu_copy(fit.module.state_dict())
    if which == "best":
        checkpoint = cast(Any, fit.trainer).checkpoint_callback
        path = str(getattr(checkpoint, "best_model_path", "") or "")
        if not path:
            raise ConfigError(
                "ingredient.weights=best, but the trainer kept no best checkpoint. Give it a ModelCheckpoint with a "
                "monitor, or take the last weights: ingredient.weights=raw."
            )
        with open_store(path, state="state_dict") as store:
            return store.load()
    kept = {
        member.settings.name: callback
        for callback in cast(list[Any], cast(Any, fit.trainer).callbacks)
        if isinstance(callback, Averaging)
        for member in callback.members()
    }
    if which not in kept:
        raise ConfigError(
            f"ingredient.weights={which}, but no callback of the trainer keeps an average of that name. "
            f"{did_you_mean(which, ['raw', 'best', *kept])} The averages of callbacks=[ema,lawa] are there only if the "
            f"program gives cfg.callbacks to its Trainer."
        )
    return cpu_copy(kept[which].average(which))


class Evaluation:
    """The project's own validation and test loops, on one device, without its callbacks and loggers.

    Callbacks that swap weights (averages) or stop runs have no say here: what is evaluated is the weights that were given.
    """

    def __init__(self, fit: Fit) -> None:
        owner: Any = fit.trainer
        self.fit = fit
        self.trainer = lightning.Trainer(
            accelerator=owner.accelerator.name(),
            devices=1,
            precision=owner.precision,
            limit_val_batches=owner.limit_val_batches,
            limit_test_batches=owner.limit_test_batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def validate(self, weights: Weights | None = None) -> dict[str, float]:
        """Return what `trainer.validate` logs for some weights, or for the module as it is.

        Raises:
            ConfigError: the project has no validation loop or data.
        """
        loaders = self.fit.arguments.get("val_dataloaders")
        return self._run(self.trainer.validate, "validate", weights, loaders)

    def test(self, weights: Weights) -> dict[str, float]:
        """Return what `trainer.test` logs for some weights; nothing where the project has no test loop or data."""
        source = self.fit.arguments.get("datamodule") or self.fit.module
        own, base = type(source).test_dataloader, lightning.LightningDataModule.test_dataloader
        inherited = own in (base, lightning.LightningModule.test_dataloader)
        if inherited or type(self.fit.module).test_step is lightning.LightningModule.test_step:
            return {}
        return self._run(self.trainer.test, "test", weights, None)

    def _run(self, loop: Callable[..., Any], name: str, weights: Weights | None, loaders: Any) -> dict[str, float]:
        module, before = self.fit.module, getattr(self.fit.module, "_trainer", None)
        if weights is not None:
            module.load_state_dict(weights)
        # Only this process evaluates: a torchmetrics.Metric must not wait for the other ranks of the fit to gather from.
        metrics: list[Any] = [part for part in module.modules() if hasattr(part, "distributed_available_fn")]
        gathering = [(part, part.distributed_available_fn) for part in metrics]
        for part in metrics:
            part.distributed_available_fn = _alone
        try:
            found = loop(module, dataloaders=loaders, datamodule=self.fit.arguments.get("datamodule"), verbose=False)
        except MisconfigurationException as error:
            raise ConfigError(
                f"trainer.{name} does not run on this project, and a soup is chosen by its validation: {error}"
            ) from error
        finally:
            for part, available in gathering:
                part.distributed_available_fn = available
            if before is not None:
                module.trainer = before
                if (data := self.fit.arguments.get("datamodule")) is not None:
                    data.trainer = before
        return {key: float(value) for row in found for key, value in row.items()}


def _alone() -> bool:
    return False
