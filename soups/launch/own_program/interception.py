"""Intercept `Trainer.fit` of both packages that Lightning is published as, while somebody's program runs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import inspect
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from soups.errors import ConfigError
from soups.launch.own_program.module_weights import initial_weights
from soups.weights import Weights

# Strategies that leave no rank with the whole model after a fit.
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
# The two names that Lightning is published under. Importing the older one takes over the logging of the newer.
_NEW, _OLD = "lightning.pytorch", "pytorch_lightning"
# Whether a tuner's fit is running.
_tuning: ContextVar[bool] = ContextVar("tuning", default=False)


def packages() -> list[ModuleType]:
    """Return the packages in use: `lightning.pytorch`, and `pytorch_lightning` once a program has imported it."""
    return [importlib.import_module(_NEW), *([sys.modules[_OLD]] if _OLD in sys.modules else [])]


def is_tuning() -> bool:
    """Tell whether a tuner's fit (learning rate finder, batch size finder) is running, which trains nothing that stays."""
    return _tuning.get()


@dataclass(frozen=True)
class Fit:
    """One call of `trainer.fit`, before it runs. Trainer and module are of either package.

    Attributes:
        trainer: whose `fit` was called.
        module: the module that it trains.
        arguments: the call's other arguments by name: loaders, datamodule, ckpt_path.
        run: runs it.
        options: the arguments that the trainer was made with; empty where nobody saw that.
        folder: the working folder of the program.
        hydra: Hydra's configuration of the job.
    """

    trainer: Any
    module: Any
    arguments: dict[str, Any]
    run: Callable[[], None]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: str = field(default_factory=lambda: str(Path.cwd()))
    hydra: Any = None

    @property
    def processes(self) -> int:
        """The number of processes that the trainer asks for on this machine."""
        return int(self.trainer.num_devices)

    @property
    def package(self) -> ModuleType:
        """The package that the trainer is of."""
        for package in packages():
            if isinstance(self.trainer, package.Trainer):
                return package
        raise ConfigError(f"{type(self.trainer).__name__} is no Trainer of {_NEW} or {_OLD}.")

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

    def initial_weights(self) -> Weights:
        """Return a copy of the module's weights on the CPU; see `module_weights.initial_weights`."""
        return initial_weights(self.module)

    @contextlib.contextmanager
    def surroundings(self) -> Generator[None]:
        """Within the block, the working folder and Hydra's configuration are those of the program's function."""
        state: Any = HydraConfig.instance()
        before, folder = state.cfg, str(Path.cwd())
        if self.hydra is not None:
            state.cfg = self.hydra
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(folder)
            state.cfg = before


@contextlib.contextmanager
def fits_go_to(receive: Callable[[Fit], None]) -> Generator[None]:
    """Within the block, `trainer.fit(…)` calls `receive` instead; `Fit.run` is the real one.

    A tuner's fit, which ends before it trains (learning rate finder, batch size finder), stays as it is.
    """
    with contextlib.ExitStack() as stack:
        for package in packages():
            stack.enter_context(_intercepted(package.Trainer, receive))
        if _OLD not in sys.modules:
            stack.enter_context(
                _on_import(_OLD, lambda package: stack.enter_context(_intercepted(package.Trainer, receive)))
            )
        yield


@contextlib.contextmanager
def _on_import(name: str, then: Callable[[Any], object]) -> Generator[None]:
    """Within the block, `then` is called with a package as soon as something has imported it."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            spec = PathFinder.find_spec(fullname, path, target) if fullname == name else None
            if spec is None or spec.loader is None:
                return None
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                then(module)

            spec.loader.exec_module = exec_module
            return spec

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextlib.contextmanager
def _intercepted(trainer: Any, receive: Callable[[Fit], None]) -> Generator[None]:
    original, construct = trainer.fit, trainer.__init__
    signature = inspect.signature(original)

    @functools.wraps(construct)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        if not hasattr(self, "_soups_options"):
            self._soups_options = dict(named)
        construct(self, *arguments, **named)

    @functools.wraps(original)
    def fit(self: Any, *arguments: Any, **named: Any) -> None:
        if any(getattr(callback, "_early_exit", False) for callback in self.callbacks):
            token = _tuning.set(True)
            try:
                original(self, *arguments, **named)
            finally:
                _tuning.reset(token)
            return
        given = dict(signature.bind(self, *arguments, **named).arguments)
        given.pop("self")
        module = given.pop("model")
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        if hasattr(
            loaders := given.get("train_dataloaders"), "train_dataloader"
        ):  # a datamodule in the place of loaders
            given["datamodule"] = loaders
        options = getattr(self, "_soups_options", {})
        hydra: Any = HydraConfig.instance()
        receive(
            Fit(self, module, given, lambda: original(self, *arguments, **named), options, str(Path.cwd()), hydra.cfg)
        )

    trainer.fit, trainer.__init__ = fit, init
    try:
        yield
    finally:
        trainer.fit, trainer.__init__ = original, construct
