"""A module's weights: its tensors, without state of other kinds, on the CPU; and what a finished fit leaves."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from soups.errors import ConfigError, WeightsError, did_you_mean
from soups.stores import open_store
from soups.weights import Weights

# What PyTorch calls the state that a module keeps besides its tensors (`get_extra_state`).
_EXTRA = "_extra_state"


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return contiguous copies of a module's tensors on the CPU; extra state is left out (see `extra_state`)."""
    return cpu_copy(module.state_dict())


def cpu_copy(state: Weights) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU of the tensors of a state dict, without extra state."""
    return {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in cast(dict[str, Any], state).items()
        if isinstance(tensor, Tensor) and not _is_extra(name)
    }


def extra_state(module: nn.Module) -> list[str]:
    """Return the names of the state that is no weight (`get_extra_state`): no average of it means anything."""
    state: dict[str, Any] = module.state_dict()
    return [name for name, value in state.items() if _is_extra(name) or not isinstance(value, Tensor)]


def _is_extra(name: str) -> bool:
    return name == _EXTRA or name.endswith(f".{_EXTRA}")


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Load weights into a module, whose extra state stays as it is.

    Raises:
        RuntimeError: a tensor is missing, unexpected or of another shape.
    """
    found: Any = module.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not _is_extra(name)]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(found.unexpected_keys) or 'none'}"
        )


def initial_weights(module: Any) -> dict[str, Tensor]:
    """Return a copy of a module's weights before its fit.

    Raises:
        WeightsError: it has none: its layers are made later, in `setup` or during the fit.
    """
    module.configure_model()  # does nothing where it is not overridden, and nothing the second time
    weights = weights_of(module)
    if not weights:
        raise WeightsError(
            f"{type(module).__name__} has no weights when trainer.fit is called. Make its layers in __init__ or in "
            f"configure_model, so that all ingredients can be given one start."
        )
    return weights


def finished_weights(trainer: Any, module: Any, which: str) -> dict[str, Tensor]:
    """Return the weights that a finished fit leaves, on the CPU.

    Args:
        trainer: of the fit.
        module: that it trained.
        which: "raw" for the last weights, "best" for those of the best checkpoint, or the name of an average.

    Raises:
        ConfigError: there is no such thing.
    """
    if which == "raw":
        return weights_of(module)
    if which == "best":
        path = str(getattr(trainer.checkpoint_callback, "best_model_path", "") or "")
        if not path:
            raise ConfigError(
                "ingredient.weights=best, but the trainer kept no best checkpoint. Give it a ModelCheckpoint with a "
                "monitor, or take the last weights: ingredient.weights=raw."
            )
        with open_store(path, state="state_dict") as store:
            return store.load()
    kept = averages_of(trainer)
    if which not in kept:
        raise ConfigError(
            f"ingredient.weights={which}, but no callback of the trainer keeps an average of that name. "
            f"{did_you_mean(which, ['raw', 'best', *kept])} The averages of callbacks=[ema,lawa] are there only if the "
            f"program gives cfg.callbacks to its Trainer."
        )
    return cpu_copy(kept[which].average(which))


def averages_of(trainer: Any) -> dict[str, Any]:
    """Return the callbacks of a trainer that keep averages, by the averages' names."""
    from soups.callbacks import Averaging

    return {
        member.settings.name: callback
        for callback in trainer.callbacks
        if isinstance(callback, Averaging)
        for member in callback.callbacks()
    }
